"""Host and GPU: what do the processes use, and is the machine the limit?

Panels of node_exporter and dcgm-exporter say so where these are not scraped.
"""

from offramp_dashboards.board import Board, Row, Variable
from offramp_dashboards.panels import Lines, Query

NO_NODE = "node_exporter is not scraped"
NO_GPU = "dcgm-exporter is not scraped"

OURS = " and on (job, instance) offramp_ready{$sel}"
"""Every exporter has metrics of its process; only those of offramp's are meant."""

PROCESS = Row(
    "Processes",
    [
        Lines(
            title="Processor",
            question="How many cores does each replica use, engine and HTTP together? With "
            "--http-workers above 1: its engine's process.",
            queries=[
                Query(f"rate(process_cpu_seconds_total[$__rate_interval]){OURS}", "{{instance}}")
            ],
            width=8,
            unit="none",
            decimals=2,
        ),
        Lines(
            title="Memory",
            question="How much memory does each replica hold, and does it grow?",
            queries=[Query(f"process_resident_memory_bytes{OURS}", "{{instance}}")],
            unit="bytes",
            width=8,
        ),
        Lines(
            title="Threads",
            question="How many threads does each replica have? The number should stand still.",
            queries=[Query(f"process_threads{OURS}", "{{instance}}")],
            width=8,
        ),
        Lines(
            title="Engine busy",
            question="Does the engine compute all the time, or does it wait for texts?",
            queries=[
                Query(
                    "rate(offramp_engine_busy_seconds_total{$sel}[$__rate_interval])",
                    "{{instance}} {{model_name}}",
                )
            ],
            unit="percentunit",
            width=8,
        ),
        Lines(
            title="Open files",
            question="Is the limit of open files (connections, mostly) near?",
            queries=[Query(f"process_open_fds / process_max_fds{OURS}", "{{instance}}")],
            unit="percentunit",
            width=8,
        ),
        Lines(
            title="Uptime",
            question="When did each replica start? A saw is a crash loop.",
            queries=[Query(f"time() - process_start_time_seconds{OURS}", "{{instance}}")],
            unit="s",
            width=8,
        ),
    ],
)

HOST = Row(
    "Host (node_exporter)",
    [
        Lines(
            title="Processor busy",
            question="Which share of the machine's cores is busy, with whatever?",
            queries=[
                Query(
                    "1 - avg by (instance) "
                    '(rate(node_cpu_seconds_total{mode="idle", instance=~"$node"}'
                    "[$__rate_interval]))",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            most=1,
            empty=NO_NODE,
            width=8,
        ),
        Lines(
            title="Load per core",
            question="Do threads stand in line for a core? Above 1 they do.",
            queries=[
                Query(
                    'node_load1{instance=~"$node"} / on (job, instance) '
                    "count by (job, instance) "
                    '(node_cpu_seconds_total{mode="idle", instance=~"$node"})',
                    "{{instance}}",
                )
            ],
            empty=NO_NODE,
            width=8,
        ),
        Lines(
            title="Memory available",
            question="How much memory could still be had?",
            queries=[Query('node_memory_MemAvailable_bytes{instance=~"$node"}', "{{instance}}")],
            unit="bytes",
            empty=NO_NODE,
            width=8,
        ),
        Lines(
            title="Network",
            question="How much goes in and out, loopback left out?",
            queries=[
                Query(
                    f"sum by (instance) (rate(node_network_{way}_bytes_total"
                    '{device!="lo", instance=~"$node"}[$__rate_interval]))',
                    f"{{{{instance}}}} {said}",
                )
                for way, said in (("receive", "in"), ("transmit", "out"))
            ],
            unit="Bps",
            empty=NO_NODE,
            width=24,
            height=6,
        ),
    ],
)

GPU = Row(
    "GPU (dcgm-exporter)",
    [
        Lines(
            title="GPU busy",
            question="Which share of the time runs any kernel at all?",
            queries=[Query("DCGM_FI_DEV_GPU_UTIL / 100", "{{Hostname}} {{gpu}}")],
            unit="percentunit",
            most=1,
            empty=NO_GPU,
            width=8,
        ),
        Lines(
            title="Tensor cores busy",
            question="Which share of the time are the tensor cores at work? Far below `busy`, "
            "batches are small or launches are the limit.",
            queries=[Query("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "{{Hostname}} {{gpu}}")],
            unit="percentunit",
            most=1,
            empty=NO_GPU,
            width=8,
        ),
        Lines(
            title="GPU memory",
            question="How much of the GPU's memory is in use?",
            queries=[
                Query(
                    "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)",
                    "{{Hostname}} {{gpu}}",
                )
            ],
            unit="percentunit",
            most=1,
            empty=NO_GPU,
            width=8,
        ),
        Lines(
            title="Power",
            question="How much power does it draw? At its limit clocks fall.",
            queries=[Query("DCGM_FI_DEV_POWER_USAGE", "{{Hostname}} {{gpu}}")],
            unit="watt",
            empty=NO_GPU,
            width=8,
        ),
        Lines(
            title="Clock",
            question="Does it run at full clock?",
            queries=[Query("DCGM_FI_DEV_SM_CLOCK * 1e6", "{{Hostname}} {{gpu}}")],
            unit="hertz",
            empty=NO_GPU,
            width=8,
        ),
        Lines(
            title="Temperature",
            question="Is it getting hot?",
            queries=[Query("DCGM_FI_DEV_GPU_TEMP", "{{Hostname}} {{gpu}}")],
            unit="celsius",
            empty=NO_GPU,
            width=8,
        ),
    ],
)

BOARD = Board(
    "offramp-host",
    "Host and GPU",
    "What the processes use, and whether the machine is the limit.",
    [PROCESS, HOST, GPU],
    [
        Variable(
            "node",
            "Host",
            "label_values(node_uname_info, instance)",
            "Machines of node_exporter; their ports differ from the service's",
        )
    ],
)
