"""The service's metrics as they come to be known outside: families of an exposition, and what the
documentation and the dashboards make of them."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from offramp_service.metrics import Families, Metrics

# Of a scrape, not of what is scraped.
TARGET_LABELS = frozenset({"job", "instance", "namespace"})

# Counted, and on purpose on no dashboard and in no rule.
UNUSED = {
    "process_virtual_memory_bytes": "address space says nothing about memory; resident does",
}

# Of other exporters, which need not be there.
NODE = {
    "node_cpu_seconds_total",
    "node_load1",
    "node_memory_MemAvailable_bytes",
    "node_network_receive_bytes_total",
    "node_network_transmit_bytes_total",
    "node_uname_info",
}
DCGM = {
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_SM_CLOCK",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
}
# Prometheus's own.
PROMETHEUS = {"ALERTS", "up"}


def families() -> list[Metric]:
    """What a server with one model exposes."""
    registry = CollectorRegistry()
    metrics = Metrics(
        Families(registry, 4, ["/classify"]), model_name="m", model_version="1", num_layers=4
    )
    facts = ("model_sha", "dtype", "device", "exit_policy", "num_layers")
    metrics.describe_model(default_speedup=1.0, facts=dict.fromkeys(facts, "x"))
    return list(registry.collect())


def series_of(all_families: Iterable[Metric]) -> dict[str, set[str]]:
    """Names of series and their labels, those of the scrape included."""
    labels: dict[str, set[str]] = {}
    for family in all_families:
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue  # the command switches these off
            labels.setdefault(sample.name, set(TARGET_LABELS)).update(sample.labels)
    return labels


def documented(family: Metric) -> str:
    """The name by which people know it: a counter's with `_total`."""
    return f"{family.name}_total" if family.type == "counter" else family.name
