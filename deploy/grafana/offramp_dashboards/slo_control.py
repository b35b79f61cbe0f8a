"""SLO control: is the latency target kept, and what does keeping it cost?"""

from offramp_dashboards.board import Board, Row
from offramp_dashboards.panels import Lines, Number, Query, Steps

NO_TARGET = "no target (--slo-p95-ms)"
CLIENTS_P95 = (
    "histogram_quantile(0.95, sum by (le) "
    "(instance_le:offramp_request_duration_seconds_bucket:rate5m{$sel})) >= 0"
)

NOW = Row(
    "Now",
    [
        Number(
            title="Target",
            question="Within which time are 95 % of the requests to be answered?",
            queries=[
                Query(
                    "min by (model_name) (offramp_slo_target_seconds{$sel} > 0)", "{{model_name}}"
                )
            ],
            unit="s",
            empty=NO_TARGET,
        ),
        Number(
            title="p95 of the target",
            question="How much of the target do requests take, in the worst replica, as the "
            "controller sees it? From 80 % on it raises speed-ups.",
            queries=[
                Query(
                    "max by (model_name) (offramp_slo_p95_seconds{$sel} "
                    "/ offramp_slo_target_seconds{$sel} >= 0)",
                    "{{model_name}}",
                )
            ],
            unit="percentunit",
            steps=Steps(0.8, 1),
            empty="no target, or under 20 requests",
        ),
        Number(
            title="Floor of speed-ups",
            question="Below which speed-up is nobody answered now? 1 is no interference.",
            queries=[Query("max by (model_name) (offramp_speedup_floor{$sel})", "{{model_name}}")],
            decimals=2,
            steps=Steps(1.01, 3),
        ),
        Number(
            title="Expected accuracy",
            question="Which accuracy does calibration give at the default speed-up as it is raised "
            "now, in the worst replica?",
            queries=[
                Query(
                    "min by (model_name) (offramp_expected_accuracy{$sel} >= 0)", "{{model_name}}"
                )
            ],
            unit="percentunit",
            decimals=2,
            empty="no calibration",
        ),
        Number(
            title="Adjustments",
            question="How often was the floor moved in the last ten minutes?",
            queries=[Query("sum(increase(offramp_controller_adjustments_total{$sel}[10m]))")],
            decimals=0,
        ),
        Number(
            title="Refused",
            question="Which share is refused all the same (429)? The controller is against that.",
            queries=[
                Query(
                    'sum(instance_code:offramp_requests:rate5m{code="429", $sel}) '
                    "/ (sum(instance_code:offramp_requests:rate5m{$sel}) > 0)"
                )
            ],
            unit="percentunit",
            steps=Steps(0.01, 0.05),
            empty="no requests",
        ),
    ],
)

CONTROL = Row(
    "Control",
    [
        Lines(
            title="p95 against the target",
            question="Is the target kept? The controller's p95 is of 10 s and from admission on, "
            "the clients' of 5 min and from request to answer.",
            queries=[
                Query("offramp_slo_p95_seconds{$sel} >= 0", "{{instance}} {{model_name}}"),
                Query(CLIENTS_P95, "clients, all replicas"),
                Query("min(offramp_slo_target_seconds{$sel} > 0)", "target"),
            ],
            unit="s",
            empty=NO_TARGET,
        ),
        Lines(
            title="Effective speed-up",
            question="To what does the controller raise speed-ups, from which default, and what "
            "comes out over all texts?",
            queries=[
                Query("offramp_speedup_floor{$sel}", "{{instance}} {{model_name}}: floor"),
                Query(
                    "max by (model_name) (offramp_default_speedup{$sel})", "{{model_name}}: default"
                ),
                Query(
                    "1 + sum(rate(offramp_layers_saved_total{$sel}[$__rate_interval])) "
                    "/ (sum(rate(offramp_layer_executions_total{$sel}[$__rate_interval])) > 0)",
                    "achieved",
                ),
            ],
            least=1,
        ),
        Lines(
            title="Expected accuracy",
            question="What does raising cost in accuracy, by calibration?",
            queries=[Query("offramp_expected_accuracy{$sel} >= 0", "{{instance}} {{model_name}}")],
            unit="percentunit",
            least=None,
            empty="no calibration",
        ),
        Lines(
            title="Adjustments",
            question="Does the floor move all the time? It should be quiet between peaks.",
            queries=[
                Query(
                    "sum by (direction) "
                    "(increase(offramp_controller_adjustments_total{$sel}[$__rate_interval]))",
                    "{{direction}}",
                )
            ],
            stacked="normal",
        ),
    ],
)

LOAD = Row(
    "What it reacts to",
    [
        Lines(
            title="Load",
            question="How many requests come in, and how many of them are refused?",
            queries=[
                Query("sum(rate(offramp_requests_total{$sel}[$__rate_interval]))", "all"),
                Query(
                    'sum(rate(offramp_requests_total{code="429", $sel}[$__rate_interval]))',
                    "refused",
                ),
            ],
            unit="reqps",
        ),
        Lines(
            title="Work that waits",
            question="How many seconds of computing stand before a newcomer?",
            queries=[
                Query("instance:offramp_queue_seconds{$sel}", "{{instance}} {{model_name}}"),
                Query("min(offramp_slo_target_seconds{$sel} > 0)", "target"),
            ],
            unit="s",
        ),
    ],
)

BOARD = Board(
    "offramp-slo",
    "SLO control",
    "Is the latency target (--slo-p95-ms) kept, and what does keeping it cost in accuracy?",
    [NOW, CONTROL, LOAD],
)
