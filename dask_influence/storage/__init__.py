"""Where data come from and where results go: URLs, sources of samples, and Zarr groups of tiles.

The floor knows obstore, zarr, xarray and the containers that samples come in; it knows no model, no
estimator and no scheduler. Siblings: :mod:`~dask_influence.storage.stores` (locations and
credentials) carries :mod:`~dask_influence.storage.sources` (samples by range) and
:mod:`~dask_influence.storage.results` (template, region writes, finish).
"""
