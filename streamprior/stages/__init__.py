"""What thinks: each file turns the batch one step further.

prepare -> classify -> match -> refine, and drift behind them in the order of the scan; `recipe` puts them together. Beneath them lie

* features: under classify.
* schedule, shrink: under refine, wherever it computes.
* blocks (block_layout, block_passes, lanes), or planned (projections) for other lengths: what refine iterates with on a CPU.
* classify_cuda, refine_cuda (iterate_cuda, told_cuda): the same stages on a card; landing_cuda brings frames there.
"""
