"""Overview: does it answer, how fast, how much, and what waits?"""

from offramp_dashboards.board import Board, Row
from offramp_dashboards.panels import Lines, Number, Query, Steps, Table


def _quantile(share: float, stage: str) -> str:
    rates = f"instance_le:offramp_{stage}_duration_seconds_bucket:rate5m{{$sel}}"
    return f"histogram_quantile({share}, sum by (le) ({rates})) >= 0"


def _mean(name: str) -> str:
    return (
        f"sum(rate({name}_sum{{$sel}}[$__rate_interval])) "
        f"/ (sum(rate({name}_count{{$sel}}[$__rate_interval])) > 0)"
    )


NOW = Row(
    "Now",
    [
        Number(
            title="Requests",
            question="How many requests come in, per second, over the last five minutes?",
            queries=[Query("sum(instance_code:offramp_requests:rate5m{$sel})")],
            unit="reqps",
        ),
        Number(
            title="Failed",
            question="Which share of the requests did the service fail (424, 500, 503)?",
            queries=[
                Query(
                    'sum(instance_code:offramp_requests:rate5m{code=~"424|500|503", $sel}) '
                    "/ (sum(instance_code:offramp_requests:rate5m{$sel}) > 0)"
                )
            ],
            unit="percentunit",
            steps=Steps(0.001, 0.01),
            empty="no requests",
        ),
        Number(
            title="Refused",
            question="Which share of the requests was refused for load (429)?",
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
        Number(
            title="p95",
            question="Within which time are 95 % of the requests answered?",
            queries=[Query(_quantile(0.95, "request"))],
            unit="s",
            empty="no requests",
        ),
        Number(
            title="Ready replicas",
            question="How many replicas of each model want traffic?",
            queries=[Query("sum by (model_name) (offramp_ready{$sel})", "{{model_name}}")],
            steps=Steps(1, 0.5),
        ),
        Number(
            title="Alerts",
            question="How many of offramp's alerts are firing? The runbook says what to do.",
            queries=[
                Query('count(ALERTS{alertname=~"Offramp.+", alertstate="firing"}) or vector(0)')
            ],
            steps=Steps(1, 2),
        ),
    ],
)

TRAFFIC = Row(
    "Traffic",
    [
        Lines(
            title="Requests by status",
            question="How do requests end? 429 is load, 499 a client that left, 504 a deadline.",
            queries=[
                Query(
                    "sum by (code) (rate(offramp_requests_total{$sel}[$__rate_interval])) > 0",
                    "{{code}}",
                )
            ],
            unit="reqps",
            stacked="normal",
            width=8,
        ),
        Lines(
            title="Failures by reason",
            question="Why do requests get no answer?",
            queries=[
                Query(
                    "sum by (reason) "
                    "(rate(offramp_request_failures_total{$sel}[$__rate_interval]))",
                    "{{reason}}",
                )
            ],
            unit="reqps",
            width=8,
        ),
        Lines(
            title="Texts and tokens",
            question="How much is there to compute? A request can carry many texts.",
            queries=[
                Query("sum(rate(offramp_samples_total{$sel}[$__rate_interval]))", "texts"),
                Query(
                    'sum(rate(offramp_tokens_total{kind="real", $sel}[$__rate_interval]))', "tokens"
                ),
            ],
            unit="cps",
            right="tokens",
            width=8,
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        Lines(
            title="Request to answer",
            question="How long do clients wait, the half of them, and the slowest?",
            queries=[
                Query(_quantile(share, "request"), f"p{share * 100:g}")
                for share in (0.5, 0.95, 0.99)
            ],
            unit="s",
            width=8,
        ),
        Lines(
            title="p95 by stage",
            question="Which stage makes the slow ones slow: tokens, the queue, or the layers?",
            queries=[
                Query(_quantile(0.95, "tokenization"), "tokenise"),
                Query(_quantile(0.95, "queue"), "queue"),
                Query(_quantile(0.95, "inference"), "inference"),
            ],
            unit="s",
            width=8,
        ),
        Lines(
            title="Mean by stage",
            question="Where does the time of a text go on average?",
            queries=[
                Query(_mean("offramp_tokenization_duration_seconds"), "tokenise"),
                Query(_mean("offramp_queue_duration_seconds"), "queue"),
                Query(_mean("offramp_inference_duration_seconds"), "inference"),
            ],
            unit="s",
            stacked="normal",
            width=8,
        ),
    ],
)

QUEUE = Row(
    "Queue and batches",
    [
        Lines(
            title="Work that waits",
            question="How many seconds of computing wait in each replica's queue? Above the line "
            "for long, replicas are missing.",
            queries=[
                Query("instance:offramp_queue_seconds{$sel}", "{{instance}} {{model_name}}"),
                Query("offramp:queue_seconds_limit", "limit of the alert"),
            ],
            unit="s",
            width=8,
        ),
        Lines(
            title="Waiting",
            question="How many texts, tokens and expected layer executions wait? Autoscaling goes "
            "by the last.",
            queries=[
                Query("sum(offramp_queue_requests{$sel})", "texts"),
                Query("sum(offramp_queue_tokens{$sel})", "tokens"),
                Query("sum(offramp_queue_layer_work{$sel})", "layer executions"),
            ],
            right="tokens",
            width=8,
        ),
        Lines(
            title="In flight",
            question="How many requests are being answered at this moment?",
            queries=[Query("max by (instance) (offramp_inflight_requests{$sel})", "{{instance}}")],
            width=8,
        ),
        Lines(
            title="Batch size",
            question="How many texts and tokens does a batch have on average?",
            queries=[
                Query(_mean("offramp_batch_size"), "texts"),
                Query(_mean("offramp_batch_tokens"), "tokens"),
            ],
            right="tokens",
            width=8,
        ),
        Lines(
            title="Why batches start",
            question="What ends the forming of batches? `idle` is an empty queue, `share` leaves "
            "some to another worker; `tokens` and `full` are load.",
            queries=[
                Query(
                    "sum by (reason) (rate(offramp_batch_dispatch_total{$sel}[$__rate_interval]))",
                    "{{reason}}",
                )
            ],
            unit="ops",
            stacked="normal",
            width=8,
        ),
        Lines(
            title="Longest wait in a batch",
            question="How long had the oldest text of a batch been waiting when it started?",
            queries=[
                Query(
                    f"histogram_quantile({share}, sum by (le) "
                    "(rate(offramp_oldest_wait_seconds_bucket{$sel}[$__rate_interval]))) >= 0",
                    f"p{share * 100:g}",
                )
                for share in (0.5, 0.95)
            ],
            unit="s",
            width=8,
        ),
    ],
)

REPLICAS = Row(
    "Replicas",
    [
        Lines(
            title="Replicas",
            question="How many replicas are there, how many are ready, and whose engine runs?",
            queries=[
                Query("count by (model_name) (offramp_ready{$sel})", "{{model_name}}: all"),
                Query("sum by (model_name) (offramp_ready{$sel})", "{{model_name}}: ready"),
                Query("sum by (model_name) (offramp_alive{$sel})", "{{model_name}}: engine alive"),
            ],
            width=8,
        ),
        Lines(
            title="Engine busy",
            question="Which share of the time does each engine compute? Near 100 % it is full.",
            queries=[
                Query(
                    "sum by (instance) (rate(offramp_engine_busy_seconds_total{$sel}"
                    "[$__rate_interval]))",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            width=8,
        ),
        Lines(
            title="Engines built anew",
            question="How many engines have crashed and were built anew in the last hour?",
            queries=[
                Query(
                    "sum by (instance) (increase(offramp_engine_rebuilds_total{$sel}[1h]))",
                    "{{instance}}",
                )
            ],
            width=8,
            steps=Steps(1, 1),
        ),
        Table(
            title="What is served",
            question="Which checkpoint, exit policy and number type does each replica serve, and "
            "where does it compute?",
            queries=[
                Query(
                    "max by (model_name, model_version, instance, exit_policy, num_layers, dtype, "
                    "device, model_sha) (offramp_model_info{$sel})"
                )
            ],
            width=24,
            height=6,
        ),
    ],
)

BOARD = Board(
    "offramp-overview",
    "Overview",
    "Rate, errors, latency and queue of the service. Look here first.",
    [NOW, TRAFFIC, LATENCY, QUEUE, REPLICAS],
)
