"""Execution: how the sums, factors and tiles are computed, by whom, and what is left behind.

From the top: ``run`` (a run that writes to a store) and ``reduce`` (one that keeps a reduction of
the scores), ``memory`` and ``lazy`` (the same in this process's memory, or as a dask array), and
``side_by_side`` (in memory, where no factor takes a pass);
``resources`` (which executor, how many threads, what pieces); ``verify`` (everything stored against
its record); ``drive`` (rounds of a fit); ``dask`` and ``local`` (the executors); ``tasks`` and
``reduce_tasks`` (what a worker runs); ``blame`` (which samples fail it, where it raises);
``shipping`` and ``artifacts`` (how models, sketches and factors reach it); ``reducer`` (the
contract of a reduction); ``options`` and ``devices`` (what processes must have); ``work``, ``plan``
and ``tree`` (integers) and ``ledger`` (what is done).

Beside the intended house, ``run``, ``memory`` and ``lazy`` stand above ``drive``: they are
three ways to arrange the same tasks, and none knows the others' storage.
"""
