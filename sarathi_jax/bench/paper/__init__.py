"""The paper's experiments, ours beside the paper's: ``make paper`` writes ``docs/paper``.

`experiment`: what a file of ``configs/experiments`` says. `kinds`: which module runs which kind. `report`: pages and
index. `deployments`, `served`, `loads`, `real`, `parallel`, `markdown`, `pictures`: what kinds share. Every other
module is a kind: it has `Settings`, `Paper` and ``run(experiment, options) -> Section``.
"""
