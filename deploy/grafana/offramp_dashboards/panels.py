"""What panels look like: a number, lines over time, a heat-map, bars, a table.

A panel states its question, which becomes its description, and asks in PromQL, where `$sel` stands
for "of the chosen models, versions and instances". It knows nothing about any metric.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATA_SOURCE = grafana.DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTED = 'model_name=~"$model_name", model_version=~"$model_version", instance=~"$instance"'

LIMITS = "^(target|(floor|limits?) of the alert)$"
"""Series of these names are drawn as what they are: lines not to be crossed."""
DASHED = [
    grafana.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
    grafana.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
]

Some = TypeVar("Some", stat.Panel, timeseries.Panel, heatmap.Panel, bargauge.Panel, table.Panel)


@dataclass(frozen=True)
class Query:
    """PromQL, and what its series are called in the legend (`{{label}}`)."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Steps:
    """Green, from `warn` on orange, from `alarm` on red; where less is worse, `alarm` is below."""

    warn: float
    alarm: float


@dataclass(frozen=True, kw_only=True)
class Panel(ABC):
    """Common to all: `empty` is shown instead of data that is not there."""

    title: str
    question: str
    queries: Sequence[Query]
    unit: str = "short"
    width: int = 12
    height: int = 8
    decimals: int | None = None
    most: float | None = None
    least: float | None = None
    steps: Steps | None = None
    empty: str | None = None

    @abstractmethod
    def build(self) -> Builder[grafana.Panel]:
        """As Grafana has it."""

    def _frame(self, panel: Some) -> Some:
        panel.title(self.title).description(self.question).datasource(DATA_SOURCE)
        panel.unit(self.unit).span(self.width).height(self.height)
        panel.thresholds(_thresholds(self.steps))
        if self.decimals is not None:
            panel.decimals(self.decimals)
        if self.least is not None:
            panel.min(self.least)
        if self.most is not None:
            panel.max(self.most)
        if self.empty is not None:
            panel.no_value(self.empty)
        return panel

    def _ask(
        self, panel: Some, *, instant: bool = False, form: PromQueryFormat | None = None
    ) -> Some:
        for letter, query in zip(ascii_uppercase, self.queries, strict=False):
            asked = prometheus.Dataquery().expr(query.expr.replace("$sel", SELECTED)).ref_id(letter)
            asked.legend_format(query.legend or "__auto")
            if form is not None:
                asked.format(form)
            panel.with_target(asked.instant() if instant else asked.range())
        return panel


@dataclass(frozen=True, kw_only=True)
class Number(Panel):
    """How it is now, large, over how it came to that."""

    width: int = 4
    height: int = 4

    def build(self) -> stat.Panel:
        panel = self._ask(self._frame(stat.Panel()))
        return (
            panel.reduce_options(_last())
            .color_mode(
                looks.BigValueColorMode.VALUE if self.steps else looks.BigValueColorMode.NONE
            )
            .graph_mode(looks.BigValueGraphMode.AREA)
            .text_mode(looks.BigValueTextMode.AUTO)
        )


@dataclass(frozen=True, kw_only=True)
class Lines(Panel):
    """How it was over time. `stacked` where the series are parts of a whole, `"percent"` for their
    shares; the series named `right` has an axis of its own, where it would dwarf the others."""

    stacked: Literal["no", "normal", "percent"] = "no"
    right: str | None = None
    least: float | None = 0

    def build(self) -> timeseries.Panel:
        panel = self._ask(self._frame(timeseries.Panel()))
        panel.line_width(1).show_points(looks.VisibilityMode.NEVER)
        panel.tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI))
        panel.legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
        )
        if self.stacked == "no":
            panel.fill_opacity(5)
        else:
            mode = {"normal": looks.StackingMode.NORMAL, "percent": looks.StackingMode.PERCENT}
            panel.fill_opacity(60).line_width(0)
            panel.stacking(common.StackingConfig().mode(mode[self.stacked]).group("A"))
        if self.right is not None:
            axis = grafana.DynamicConfigValue("custom.axisPlacement", "right")
            label = grafana.DynamicConfigValue("custom.axisLabel", self.right)
            panel.override_by_name(self.right, [axis, label])
        return panel.override_by_regexp(f"/{LIMITS}/", DASHED)


@dataclass(frozen=True, kw_only=True)
class HeatMap(Panel):
    """How a distribution moves; asks for the buckets of a histogram, cumulative as they are, which
    Grafana takes apart."""

    unit: str = "short"
    rows_are: str

    def build(self) -> heatmap.Panel:
        panel = self._ask(self._frame(heatmap.Panel()), form=PromQueryFormat.HEATMAP)
        return (
            panel.calculate(False)
            .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues"))
            .y_axis(heatmap.YAxisConfig().unit(self.unit).axis_label(self.rows_are))
            .rows_frame(heatmap.RowsHeatmapOptions().layout(looks.HeatmapCellLayout.AUTO))
            .cell_values(heatmap.CellValues().unit("short"))
            .show_legend()
            .show_y_histogram()
            .cell_gap(1)
            .hide_from(common.HideSeriesConfig().legend(False).tooltip(False).viz(False))
        )


@dataclass(frozen=True, kw_only=True)
class Bars(Panel):
    """Series beside each other, as they are at the end of the time that the board shows."""

    least: float | None = 0

    def build(self) -> bargauge.Panel:
        panel = self._ask(self._frame(bargauge.Panel()), instant=True)
        return (
            panel.reduce_options(_last())
            .orientation(looks.VizOrientation.HORIZONTAL)
            .display_mode(looks.BarGaugeDisplayMode.BASIC)
            .value_mode(looks.BarGaugeValueMode.TEXT)
        )


@dataclass(frozen=True, kw_only=True)
class Table(Panel):
    """The labels of series, one a line."""

    def build(self) -> table.Panel:
        panel = self._ask(self._frame(table.Panel()), instant=True, form=PromQueryFormat.TABLE)
        hidden = {"Time": True, "Value": True}
        panel.show_header(True).frame_index(0).align(looks.FieldTextAlignment.AUTO)
        panel.cell_options(looks.TableAutoCellOptions())
        return panel.with_transformation(
            grafana.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
        )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _thresholds(steps: Steps | None) -> build.ThresholdsConfig:
    colours: list[tuple[float | None, str]]
    if steps is None:
        colours = [(None, "green")]
    elif steps.warn <= steps.alarm:
        colours = [(None, "green"), (steps.warn, "orange"), (steps.alarm, "red")]
    else:
        colours = [(None, "red"), (steps.alarm, "orange"), (steps.warn, "green")]
    return (
        build.ThresholdsConfig()
        .mode(grafana.ThresholdsMode.ABSOLUTE)
        .steps([grafana.Threshold(value=value, color=colour) for value, colour in colours])
    )


def by_layer(expr: str) -> str:
    """With `layer` as two digits, so that 10 comes after 9 in legends."""
    return f'label_replace({expr}, "layer", "0$1", "layer", "(.)")'
