"""A dashboard: rows of panels, and what all of offramp's dashboards have in common (template
variables, links to each other, refresh). It knows no metrics but those that variables are filled
from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import dashboard as grafana

from offramp_dashboards.panels import DATA_SOURCE, Panel

TAG = "offramp"


@dataclass(frozen=True)
class Row:
    """Panels under a heading, from left to right and top to bottom."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the board: any number of the values of a label, at first all."""

    name: str
    label: str
    query: str
    description: str


CHOICES = (
    Variable(
        "model_name", "Model", "label_values(offramp_ready, model_name)", "Models that are served"
    ),
    Variable(
        "model_version",
        "Version",
        'label_values(offramp_ready{model_name=~"$model_name"}, model_version)',
        "Versions of these models, as --model-version says",
    ),
    Variable(
        "instance",
        "Instance",
        'label_values(offramp_ready{model_name=~"$model_name", model_version=~"$model_version"}, '
        "instance)",
        "Replicas that serve them",
    ),
)


@dataclass(frozen=True)
class Board:
    """One dashboard; `uid` is its address and never changes."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    more_choices: Sequence[Variable] = field(default=())

    def build(self) -> grafana.Dashboard:
        """As Grafana has it."""
        board = (
            build.Dashboard(f"offramp / {self.title}")
            .uid(self.uid)
            .description(self.description)
            .tags([TAG])
            .timezone("browser")
            .time("now-1h", "now")
            .refresh("30s")
            .readonly()
            .tooltip(grafana.DashboardCursorSync.CROSSHAIR)
            .link(_links())
            .with_variable(
                build.DatasourceVariable("datasource").label("Data source").type("prometheus")
            )
        )
        for choice in (*CHOICES, *self.more_choices):
            board.with_variable(_variable(choice))
        for row in self.rows:
            board.with_row(build.Row(row.title))
            for panel in row.panels:
                board.with_panel(panel.build())
        made = board.build()
        for number, placed in enumerate(made.panels or [], start=1):
            placed.id_val = number
        return made


def _variable(choice: Variable) -> build.QueryVariable:
    everything = grafana.VariableOption(selected=True, text="All", value="$__all")
    return (
        build.QueryVariable(choice.name)
        .label(choice.label)
        .description(choice.description)
        .datasource(DATA_SOURCE)
        .query({"query": choice.query, "refId": choice.name})
        .refresh(grafana.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(grafana.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _links() -> build.DashboardLink:
    return (
        build.DashboardLink("offramp")
        .type(grafana.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
