"""Early exit: where do texts leave, what does it save, do they get what they asked for, and are the
early answers right?"""

from offramp_dashboards.board import Board, Row
from offramp_dashboards.panels import Bars, HeatMap, Lines, Number, Query, Steps, by_layer

RUN = "sum(rate(offramp_layer_executions_total{$sel}[$__rate_interval]))"
SAVED = "sum(rate(offramp_layers_saved_total{$sel}[$__rate_interval]))"
NO_SHADOW = "nothing compared (--shadow-rate)"
NO_SPEEDUP = "no text asked for a speed-up"


def _achieved(window: str) -> str:
    """Speed-up by the class of what was asked for: all layers over those run."""
    layers = f"offramp_speedup_layers_total{{%s$sel}}[{window}]"
    every, run = layers % "", layers % 'kind="run", '
    return f"sum by (speedup) (increase({every})) / (sum by (speedup) (increase({run})) > 0)"


def _spread(which: str, share: float) -> str:
    buckets = f"offramp_speedup_{which}_bucket{{$sel}}[$__rate_interval]"
    return f"histogram_quantile({share}, sum by (le) (rate({buckets}))) >= 0"


NOW = Row(
    "Now",
    [
        Number(
            title="Speed-up",
            question="How many times less do texts run than the full model would, in layers?",
            queries=[Query(f"1 + {SAVED} / ({RUN} > 0)")],
            decimals=2,
            empty="no traffic",
        ),
        Number(
            title="Compute saved",
            question="Which share of the layers that the full model would have run was not run?",
            queries=[Query(f"{SAVED} / ({SAVED} + {RUN} > 0)")],
            unit="percentunit",
            decimals=1,
            empty="no traffic",
        ),
        Number(
            title="Mean exit layer",
            question="After which layer do texts leave on average?",
            queries=[
                Query(
                    "sum(rate(offramp_exit_layer_sum{$sel}[$__rate_interval])) "
                    "/ (sum(rate(offramp_exit_layer_count{$sel}[$__rate_interval])) > 0)"
                )
            ],
            decimals=2,
            empty="no traffic",
        ),
        Number(
            title="Agreement, last hour",
            question="Which share of early answers would the full model have given, too?",
            queries=[
                Query(
                    "sum(instance_layer:offramp_shadow_agreed:increase1h{$sel}) "
                    "/ (sum(instance_layer:offramp_shadow_compared:increase1h{$sel}) > 0)"
                )
            ],
            unit="percentunit",
            decimals=1,
            steps=Steps(0.95, 0.9),
            empty=NO_SHADOW,
        ),
        Number(
            title="Drift of exits",
            question="How far is where texts leave from calibration (population stability index)? "
            "Below 0.1 is nothing, above 0.25 a shift.",
            queries=[Query("max(offramp_exit_share_drift{$sel})")],
            decimals=3,
            steps=Steps(0.1, 0.25),
        ),
        Number(
            title="Achieved of expected",
            question="Do texts get the speed-up that calibration gives for what they ask? 1: yes.",
            queries=[
                Query(
                    "sum(offramp_speedup_drift{$sel} * offramp_drift_texts{$sel}) "
                    "/ (sum(offramp_drift_texts{$sel}) > 0)"
                )
            ],
            decimals=3,
            empty=NO_SPEEDUP,
        ),
    ],
)

EXITS = Row(
    "Where texts leave",
    [
        HeatMap(
            title="Exit layers over time",
            question="After which layer do how many texts leave, and does that move?",
            queries=[
                Query(
                    "sum by (le) "
                    '(increase(offramp_exit_layer_bucket{le!="+Inf", $sel}[$__rate_interval]))',
                    "{{le}}",
                )
            ],
            rows_are="exit layer",
            width=16,
            height=9,
        ),
        Bars(
            title="Texts by exit layer",
            question="How many texts left after each layer in the time that the board shows?",
            queries=[
                Query(
                    by_layer("sum by (layer) (increase(offramp_exits_total{$sel}[$__range]))"),
                    "layer {{layer}}",
                )
            ],
            width=8,
            height=9,
            decimals=0,
        ),
        Lines(
            title="Share of texts by exit layer",
            question="How are the exits shared out, and does that change with traffic or a new "
            "checkpoint?",
            queries=[
                Query(
                    by_layer("sum by (layer) (instance_layer:offramp_exits:rate5m{$sel})"),
                    "layer {{layer}}",
                )
            ],
            stacked="percent",
            unit="cps",
        ),
        Lines(
            title="Why texts leave",
            question="Are texts sure when they leave (`criterion`), at the end (`final`), or sent "
            "out by a client's `max_layer` (`forced`)?",
            queries=[
                Query(
                    "sum by (reason) (rate(offramp_exits_total{$sel}[$__rate_interval]))",
                    "{{reason}}",
                )
            ],
            stacked="normal",
            unit="cps",
        ),
    ],
)

SAVINGS = Row(
    "What it saves",
    [
        Lines(
            title="Layers run and saved",
            question="How many text-layers are computed, and how many are not because texts left "
            "before?",
            queries=[Query(RUN, "run"), Query(SAVED, "saved")],
            stacked="normal",
            unit="ops",
            width=8,
        ),
        Lines(
            title="Compute saved",
            question="Which share of the full model's layers is not run? Texts whose client left "
            "count as run.",
            queries=[Query(f"{SAVED} / ({SAVED} + {RUN} > 0)", "saved")],
            unit="percentunit",
            most=1,
            width=8,
        ),
        Lines(
            title="Survivors",
            question="Which share of the texts that enter runs each layer?",
            queries=[
                Query(
                    by_layer(
                        "sum by (layer) (instance_layer:offramp_layer_executions:rate5m{$sel})"
                    )
                    + " / on () group_left () (sum("
                    'instance_layer:offramp_layer_executions:rate5m{layer="1", $sel}) > 0)',
                    "layer {{layer}}",
                )
            ],
            unit="percentunit",
            most=1,
            width=8,
        ),
        Lines(
            title="Texts of a batch by layer",
            question="How many texts does a batch still have when it runs a layer? A batch that is "
            "over by then does not count.",
            queries=[
                Query(
                    by_layer(
                        "sum by (layer) "
                        "(rate(offramp_layer_batch_size_sum{$sel}[$__rate_interval])) "
                        "/ (sum by (layer) "
                        "(rate(offramp_layer_batch_size_count{$sel}[$__rate_interval])) > 0)"
                    ),
                    "layer {{layer}}",
                )
            ],
        ),
        Lines(
            title="Compactions",
            question="What do exits do to batches: nobody leaves, the batch shrinks, or it ends? "
            "On CPU each shrinking is a compaction; the device lane compacts where it pays.",
            queries=[
                Query(
                    "sum by (outcome) (rate(offramp_batch_exits_total{$sel}[$__rate_interval]))",
                    "{{outcome}}",
                )
            ],
            stacked="normal",
            unit="ops",
        ),
    ],
)

ASKED = Row(
    "Asked for and achieved",
    [
        Lines(
            title="Achieved, by what was asked for",
            question="What speed-up do texts get that asked for 1, 1.5, 2 …? Each line should be "
            "near its name (classes are named by their least speed-up), or above it while the SLO "
            "controller raises them.",
            queries=[Query(_achieved("$__rate_interval"), "asked ≥ {{speedup}}")],
            least=1,
        ),
        Bars(
            title="Achieved in the time shown",
            question="What did texts get that asked for so much, over all the time that the board "
            "shows?",
            queries=[Query(_achieved("$__range"), "asked ≥ {{speedup}}")],
            decimals=2,
        ),
        Lines(
            title="What requests ask for",
            question="Which speed-ups do answered requests ask for: the least tenth, the middle, "
            "the highest tenth?",
            queries=[
                Query(_spread("requested", share), f"p{share * 100:g}") for share in (0.1, 0.5, 0.9)
            ],
            least=1,
            width=8,
        ),
        Lines(
            title="What requests get",
            question="How widely are single requests spread? A mean of these is not the speed-up "
            "of the traffic.",
            queries=[
                Query(_spread("achieved", share), f"p{share * 100:g}") for share in (0.1, 0.5, 0.9)
            ],
            least=1,
            width=8,
        ),
        Lines(
            title="Server's default",
            question="What does a request get that names no speed-up?",
            queries=[
                Query(
                    "max by (model_name) (offramp_default_speedup{$sel})", "default {{model_name}}"
                )
            ],
            least=1,
            width=8,
        ),
    ],
)

RIGHT = Row(
    "Are early answers right?",
    [
        Lines(
            title="Agreement by exit, last hour",
            question="How often does the last exit say the same as the one where the text left? "
            "Below the line the alert fires, over all exits.",
            queries=[
                Query(
                    by_layer(
                        "sum by (layer) (instance_layer:offramp_shadow_agreed:increase1h{$sel}) "
                        "/ (sum by (layer) "
                        "(instance_layer:offramp_shadow_compared:increase1h{$sel}) > 0)"
                    ),
                    "layer {{layer}}",
                ),
                Query("offramp:agreement_floor", "floor of the alert"),
            ],
            unit="percentunit",
            least=None,
            most=1,
            empty=NO_SHADOW,
            width=8,
        ),
        Lines(
            title="Compared by exit, last hour",
            question="On how many texts does the agreement of each exit stand? Of 100 texts it is "
            "known to about 6 points.",
            queries=[
                Query(
                    by_layer(
                        "sum by (layer) (instance_layer:offramp_shadow_compared:increase1h{$sel})"
                    ),
                    "layer {{layer}}",
                )
            ],
            width=8,
        ),
        Lines(
            title="What watching costs",
            question="How much is computed for comparisons, as a share of the layers for clients, "
            "and how many were dropped for want of an idle moment?",
            queries=[
                Query(
                    "sum(rate(offramp_shadow_layer_executions_total{$sel}[$__rate_interval])) "
                    f"/ ({RUN} > 0)",
                    "layers, of those for clients",
                ),
                Query(
                    "sum(rate(offramp_shadow_dropped_total{$sel}[$__rate_interval])) "
                    '/ (sum(rate(offramp_exits_total{reason="criterion", $sel}'
                    "[$__rate_interval])) > 0)",
                    "dropped, of early exits",
                ),
            ],
            unit="percentunit",
            width=8,
        ),
    ],
)

DRIFT = Row(
    "Against calibration",
    [
        Lines(
            title="Drift of exit shares",
            question="Do texts leave elsewhere than the calibration rows did (population stability "
            "index, for exactly this mix of requests)?",
            queries=[
                Query("offramp_exit_share_drift{$sel}", "{{instance}} {{model_name}}"),
                Query("offramp:share_drift_limit", "limit of the alert"),
            ],
            width=8,
        ),
        Lines(
            title="Achieved over expected speed-up",
            question="Is traffic easier (above 1) or harder (below) than the calibration rows, and "
            "what does --speedup-correction answer?",
            queries=[
                Query("offramp_speedup_drift{$sel}", "{{instance}} {{model_name}}: achieved"),
                Query(
                    "offramp_speedup_correction{$sel}", "{{instance}} {{model_name}}: correction"
                ),
                Query("1 + offramp:speedup_drift_limit", "limits of the alert"),
                Query("1 - offramp:speedup_drift_limit", "limits of the alert"),
            ],
            least=None,
            width=8,
        ),
        Lines(
            title="Texts that drift is known from",
            question="Has each replica seen enough texts to say? From 500 on alerts listen.",
            queries=[Query("offramp_drift_texts{$sel}", "{{instance}} {{model_name}}")],
            width=8,
        ),
    ],
)

BOARD = Board(
    "offramp-early-exit",
    "Early exit",
    "Where texts leave, what it saves, whether they get what they asked for, and whether early "
    "answers are right.",
    [NOW, EXITS, SAVINGS, ASKED, RIGHT, DRIFT],
)
