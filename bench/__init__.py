"""Benchmarks. Each prints a table, and with ``--json FILE`` writes its figures behind where they come from (``bench.report``).
They may import anything.

    python -m bench.cost_rules     bring KV back or compute it again: measured costs against fixed rules, in a virtual clock
    python -m bench.disk           the disk tier against plain files
    python -m bench.engine         throughput, latency, host work and memory of the engine; ``--profile``: its single steps
    python -m bench.kernels        every kernel against the machine's limits, other libraries and the targets
    python -m bench.kv_codec       what the KV codec of the lower tiers costs in quality and time
    python -m bench.kv_quality     what a quantised KV cache costs in quality
    python -m bench.mesh_loads     two ways of loading pages over a mesh
    python -m bench.motivation     moving KV against computing it
    python -m bench.replay         eviction policies on a request trace
    python -m bench.sampling       truncated sampling: the full sort against the two-stage selection
    python -m bench.server         what HTTP costs beside the engine in process
    python -m bench.soak           long proofs of cache, disk and server; resumable
    python -m bench.tiers          what the tiers below HBM give
    python -m bench.tune           searches the block sizes of the attention kernels

The other modules help them. Of the engine: ``first_token``, ``products``, ``step_profile``, ``workloads``. Of the kernels:
``kernel_cases``, ``kernel_peers``, ``kernel_report``, ``kernel_runs``, ``page_moves``, ``roofline``, ``torch_peers``. Of the
replay: ``replay_one``, ``replay_optimum``, ``replay_speed``, ``replay_trace``. Of server and soak: ``server_client``,
``soak_cache``, ``soak_disk``, ``soak_server``. Of motivation: ``swap``; of the cost rules: ``virtual``. Of several: ``limits``,
``report``, ``timing``.
"""
