"""The mathematics, in pure torch: objective, derivatives, curvature sums, estimators.

Nothing below here knows dask, distributed, zarr or xarray; whoever runs it sums what the
estimators ask for.
"""
