"""The Helm chart: what it renders is valid, restricted, and what the service understands."""

import json
import re
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from loading import ROOT, load
from offramp_service.settings import Settings, parse_command_line

kube = load("tests/deploy/kube.py")
promql = load("tests/deploy/promql.py")
workshop = load("scripts/chart.py")

DOCKERFILE = ROOT / "Dockerfile"
CHART, Object = kube.CHART, dict[str, Any]
CASES = ["default", "everything", "gpu", "hpa", "keda", "minimal"]
MODEL = {"name": "sst2", "existingClaim": {"name": "checkpoints"}}

Try = Callable[[Object], Object]


@pytest.fixture
def attempt() -> Try:
    """Render with these values."""

    def run(values: Object) -> Object:
        ((rendered, said),) = kube.attempts([{"models": [MODEL]} | values])
        assert rendered is not None, said
        return rendered

    return run


def deployment(rendered: Object) -> Object:
    return kube.only(rendered, "Deployment")["spec"]


def container(rendered: Object) -> Object:
    (found,) = deployment(rendered)["template"]["spec"]["containers"]
    return found


# -- the chart itself ------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about() -> None:
    done = kube.chart("lint", *sorted((CHART / "ci").glob("*.yaml")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 files of values: nothing found" in done.stdout


def test_helm_complains_where_there_is_something(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("models: []\n", encoding="utf-8")
    done = kube.chart("lint", path)
    assert done.returncode == 1
    assert "minItems" in done.stdout


def test_what_is_made_is_up_to_date() -> None:
    """`make chart` would change nothing: schema, README, copies of rules and dashboards."""
    made = workshop.made()
    for path, content in made.items():
        assert path.read_text(encoding="utf-8") == content, f"{path} is behind: make chart"
    for inside, (outside, pattern) in workshop.COPIES.items():
        for copy in (CHART / inside).glob(pattern):
            assert copy in made, f"{copy} has no source in {outside}: make chart"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert about["appVersion"] == project["version"]
    assert about["kubeVersion"] == f">={kube.OLDEST}-0"
    runtime = (ROOT / "deploy/kserve/servingruntime.yaml").read_text(encoding="utf-8")
    assert f"image: offramp:{project['version']}-cpu\n" in runtime


def test_defaults_that_values_repeat_are_the_services() -> None:
    config = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["config"]
    for name in workshop.NEEDED:
        assert config[name] == Settings.model_fields[name].default


def test_every_setting_is_there_or_the_charts_own() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    names = schema["properties"]["config"]["properties"].keys()
    assert names | workshop.OWN == Settings.model_fields.keys()
    assert not names & workshop.OWN


# -- the schema refuses ----------------------------------------------------------------------


REFUSED: list[tuple[Object, str]] = [
    ({"models": []}, "/models"),
    ({"models": [{"name": "a"}]}, "missing property 'existingClaim'"),
    ({"models": [MODEL | {"url": {"url": "https://a.b/c", "sha256": "0" * 64}}]}, "oneOf"),
    ({"models": [MODEL | {"name": "a=b"}]}, "/models/0/name"),
    ({"models": [MODEL | {"version": "2"}]}, "'version'"),
    ({"models": [{"name": "a", "existingClaim": {"name": "c", "path": "../x"}}]}, "path"),
    ({"models": [{"name": "a", "existingClaim": {"name": "c", "path": "/x"}}]}, "path"),
    ({"models": [{"name": "a", "url": {"url": "https://a.b/c"}}]}, "'sha256'"),
    ({"models": [{"name": "a", "url": {"url": "s3://a/c", "sha256": "0" * 64}}]}, "/url/url"),
    ({"models": [MODEL, MODEL]}, "names of models must differ, got sst2, sst2"),
    ({"config": {"max_batch_token": 5}}, "'max_batch_token'"),
    ({"config": {"port": 80}}, "'port'"),
    ({"config": {"api_key": "sesame"}}, "'api_key'"),
    ({"config": {"dtype": "int4"}}, "/config/dtype"),
    ({"config": {"shadow_rate": 2}}, "/config/shadow_rate"),
    ({"config": {"max_batch_tokens": 0}}, "/config/max_batch_tokens"),
    ({"config": {"max_batch_tokens": "many"}}, "/config/max_batch_tokens"),
    ({"config": {"drain_seconds": None}}, "drain_seconds"),
    ({"listen": {"port": 80}}, "/listen/port"),
    ({"replica": 3}, "'replica'"),
    ({"replicas": "3"}, "/replicas"),
    ({"image": {"name": "x"}}, "'name'"),
    ({"image": {"digest": "sha256:1"}}, "/image/digest"),
    ({"autoscaling": {"mode": "vpa"}}, "/autoscaling/mode"),
    ({"autoscaling": {"minReplicas": 0}}, "/autoscaling/minReplicas"),
    ({"autoscaling": {"engineBusy": 75}}, "/autoscaling/engineBusy"),
    ({"autoscaling": {"keda": {"authModes": "magic"}}}, "authModes"),
    ({"probes": {"startup": {"httpGet": {}}}}, "'httpGet'"),
    ({"terminationSlackSeconds": 0}, "/terminationSlackSeconds"),
    ({"resources": {"cpu": 1}}, "'cpu'"),
    ({"networkPolicy": {"clients": [{}]}}, "/networkPolicy/clients/0"),
    ({"podMonitor": {"interval": "15"}}, "/podMonitor/interval"),
    ({"apiKeys": {"adminFile": "admin"}}, "apiKeys.existingSecret names none"),
    ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.hosts"),
    ({"gpu": {"enabled": True}, "config": {"device": "cpu"}}, "allowed is one of them"),
]


@pytest.fixture(scope="module")
def refusals() -> list[str | None]:
    attempts = kube.attempts([{"models": [MODEL]} | values for values, _ in REFUSED])
    return [said for _, said in attempts]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_refused(refusals: list[str | None], number: int) -> None:
    values, expected = REFUSED[number]
    said = refusals[number]
    assert said is not None, f"{values} is not refused"
    assert expected in said


# -- what it renders -------------------------------------------------------------------------


@pytest.mark.parametrize("version", [kube.OLDEST, "1.33", kube.NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_objects_are_valid(rendered: dict[str, Object], case: str, version: str) -> None:
    objects = kube.objects_of(rendered[case])
    assert len(objects) >= 3
    for one in objects:
        if version == kube.OLDEST and one["kind"] == "Deployment" and case in ("everything", "gpu"):
            with pytest.raises(kubernetes_validate.ValidationError, match="image"):
                kube.validate(one, version)  # volumes of images are newer
        else:
            kube.validate(one, version)


def test_validation_sees_what_is_wrong(rendered: dict[str, Object]) -> None:
    everything = rendered["everything"]
    broken = json.loads(json.dumps(kube.only(everything, "Deployment")))
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kube.validate(broken)
    monitor = json.loads(json.dumps(kube.only(everything, "PodMonitor")))
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = "15"
    with pytest.raises(jsonschema.ValidationError):
        kube.validate(monitor)


def kinds(rendered: Object) -> set[str]:
    return {one["kind"] for one in kube.objects_of(rendered)}


def test_which_objects_there_are(rendered: dict[str, Object]) -> None:
    least = {"ConfigMap", "Deployment", "Service"}
    usual = least | {"NetworkPolicy", "Pod", "PodDisruptionBudget", "ServiceAccount"}
    assert kinds(rendered["minimal"]) == least
    assert kinds(rendered["default"]) == usual
    assert kinds(rendered["gpu"]) == usual
    assert kinds(rendered["hpa"]) == usual | {"HorizontalPodAutoscaler", "PodMonitor"}
    assert kinds(rendered["keda"]) == usual | {"ScaledObject", "PodMonitor"}
    assert kinds(rendered["everything"]) == usual | {
        *("HorizontalPodAutoscaler", "Ingress", "PodMonitor", "PrometheusRule"),
    }


@pytest.mark.parametrize("case", CASES)
def test_names_are_not_taken_twice(rendered: dict[str, Object], case: str) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in kube.objects_of(rendered[case])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(rendered: dict[str, Object], case: str) -> None:
    pods = kube.pods_of(kube.objects_of(rendered[case]))
    assert pods
    for name, pod in pods.items():
        assert kube.offences(pod) == [], name


def test_an_unrestricted_pod_is_seen(rendered: dict[str, Object]) -> None:
    loose: Object = {"containers": [{"name": "a", "securityContext": {"privileged": True}}]}
    assert len(kube.offences(loose | {"hostNetwork": True, "volumes": [{"name": "v"}]})) >= 10
    pod = deployment(rendered["default"])["template"]["spec"]
    worse = pod | {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}
    assert kube.offences(worse) == ["volume root"]
    main = container(rendered["default"])
    for field in main["securityContext"]:
        security = {k: v for k, v in main["securityContext"].items() if k != field}
        assert kube.offences(pod | {"containers": [main | {"securityContext": security}]}), field


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_fit(rendered: dict[str, Object], case: str) -> None:
    """Selectors, names and volumes that one object says of another."""
    one = rendered[case]
    labels = deployment(one)["template"]["metadata"]["labels"].items()
    assert deployment(one)["selector"]["matchLabels"].items() <= labels
    assert kube.only(one, "Service")["spec"]["selector"].items() <= labels
    for kind, path in (("PodDisruptionBudget", "selector"), ("PodMonitor", "selector")):
        if kind in kinds(one):
            assert kube.only(one, kind)["spec"][path]["matchLabels"].items() <= labels
    if "NetworkPolicy" in kinds(one):
        spec = kube.only(one, "NetworkPolicy")["spec"]
        assert spec["podSelector"]["matchLabels"].items() <= labels
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
        test = kube.only(one, "Pod")["metadata"]["labels"].items()
        assert not spec["podSelector"]["matchLabels"].items() <= test
        peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
        assert any(
            peer.get("podSelector", {}).get("matchLabels", {"not": "it"}).items() <= test
            for peer in peers
        )
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        if kind in kinds(one):
            target = kube.only(one, kind)["spec"]["scaleTargetRef"]
            assert target["name"] == kube.only(one, "Deployment")["metadata"]["name"]
            assert "replicas" not in deployment(one)
    config_maps = {
        one["metadata"]["name"]: one["data"] for one in kube.objects_of(one) if "data" in one
    }
    for pod in kube.pods_of(kube.objects_of(one)).values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {m["name"] for c in kube.containers_of(pod) for m in c["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                content = config_maps[volume["configMap"]["name"]]
                assert {item["key"] for item in volume["configMap"].get("items", [])} <= set(
                    content
                )


# -- and the service understands -------------------------------------------------------------


def settings_of(one: Object, root: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the container's command and environment come to."""
    kube.lay_out_config(one, root)
    main = container(one)
    assert main["command"] == ["offramp-serve"]
    # What an image may preset and the file is to decide.
    monkeypatch.setenv("JSON_OUTPUT", "true")
    monkeypatch.setenv("PORT", "3999")
    for variable in main["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
        else:
            reference = variable["valueFrom"]["resourceFieldRef"]
            assert (variable["name"], reference["resource"]) == ("THREADS", "requests.cpu")
            monkeypatch.setenv("THREADS", main["resources"]["requests"]["cpu"])
    return parse_command_line([kube.moved(argument, root) for argument in main["args"]])


@pytest.mark.parametrize("case", CASES)
def test_the_server_reads_what_values_say(
    rendered: dict[str, Object], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((CHART / f"ci/{case}-values.yaml").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    settings = settings_of(rendered[case], tmp_path, monkeypatch)
    for name, value in (defaults["config"] | values.get("config", {})).items():
        found = getattr(settings, name)
        assert (list(found) if isinstance(value, list) else found) == value, name
    assert settings.model_names == tuple(one["name"] for one in values["models"])
    assert (settings.hostname, settings.port) == tuple(
        (defaults["listen"] | values.get("listen", {}))[name] for name in ("hostname", "port")
    )
    if case == "everything":
        assert settings.threads == 3
    if case == "default":
        assert settings.threads == 2


@pytest.mark.skipif(not DOCKERFILE.exists(), reason="there is no Dockerfile")
def test_what_the_image_presets_does_not_win(rendered: dict[str, Object]) -> None:
    """Environment wins over file: what an image sets must be a flag here, or emptied."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    presets = {
        name
        for line in text.splitlines()
        if line.startswith("ENV ")
        for name in re.findall(r"([A-Z][A-Z0-9_]*)=", line)
    }
    main = container(rendered["default"])
    flags = {argument.split("=")[0] for argument in main["args"]}
    emptied = {one["name"] for one in main["env"] if one.get("value") == ""}
    assert presets
    for name in presets:
        if name.lower() in Settings.model_fields:
            assert name in emptied or f"--{name.lower().replace('_', '-')}" in flags, name
    assert re.search(r"^USER 10001", text, re.MULTILINE)


def test_the_package_holds_what_it_needs(tmp_path: Path) -> None:
    """And not what it is tested with."""
    done = kube.chart("package", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as package:
        names = {name.removeprefix("offramp/") for name in package.getnames()}
    assert names >= {"Chart.yaml", "README.md", "values.schema.json", "files/fetch.py"}
    assert names >= {f"files/rules/{one.name}" for one in promql.RULES}
    assert names >= {f"files/dashboards/{one.name}" for one in promql.BOARDS}
    assert not [name for name in names if name.startswith("ci/")]


@pytest.mark.parametrize("case", CASES)
def test_the_grace_period_is_longer_than_the_drain(rendered: dict[str, Object], case: str) -> None:
    values = yaml.safe_load((CHART / f"ci/{case}-values.yaml").read_text(encoding="utf-8"))
    config = {"drain_seconds": 5, "shutdown_timeout": 30} | values.get("config", {})
    pod = deployment(rendered[case])["template"]["spec"]
    needed = config["drain_seconds"] + config["shutdown_timeout"]
    assert needed + 5 <= pod["terminationGracePeriodSeconds"] <= needed + 11


def test_where_models_come_from(rendered: dict[str, Object]) -> None:
    pod = deployment(rendered["everything"])["template"]["spec"]
    fetch, copy = pod["initContainers"]
    assert fetch["command"][-1] == "/etc/offramp/scripts/fetch.py"
    assert fetch["args"][-1] == "/models/fetched/intent.v2"
    assert copy["command"] + copy["args"] == ["cp", "-RLT", "/checkpoint", "/models/fetched/spam"]
    mounts = {m["mountPath"]: m for m in container(rendered["everything"])["volumeMounts"]}
    assert mounts.keys() >= {
        *("/models/claims/checkpoints", "/models/fetched", "/models/images/topics"),
    }
    # A mounted part of a volume stays what it was when it is exchanged by renaming.
    assert not any("subPath" in mount for mount in mounts.values())
    assert all(m.get("readOnly") for path, m in mounts.items() if path != "/tmp")
    assert open_ports(rendered["everything"]) == {53, 443, 4318}
    assert open_ports(rendered["default"]) == {53}


def open_ports(one: Object) -> set[int]:
    """To which a pod may connect."""
    rules = kube.only(one, "NetworkPolicy")["spec"]["egress"]
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def test_claims_are_mounted_once(rendered: dict[str, Object]) -> None:
    volumes = deployment(rendered["hpa"])["template"]["spec"]["volumes"]
    claims = [volume["persistentVolumeClaim"] for volume in volumes if volume["name"] == "claim-0"]
    assert claims == [{"claimName": "checkpoints", "readOnly": True}]
    assert "claim-1" not in [volume["name"] for volume in volumes]


def test_another_configuration_is_another_generation_of_pods() -> None:
    same: list[Object] = [{}, {}, {"replicas": 5}]
    others: list[Object] = [
        {"config": {"max_batch_tokens": 1024}},
        {"models": [MODEL | {"name": "other"}]},
    ]
    rendered = kube.attempts([{"models": [MODEL]} | values for values in (*same, *others)])
    annotations = [deployment(one)["template"]["metadata"]["annotations"] for one, _ in rendered]
    checksums = [one["checksum/config"] for one in annotations]
    assert len(set(checksums[: len(same)])) == 1
    assert len(set(checksums)) == 1 + len(others)


def test_keys(attempt: Try) -> None:
    one = attempt({"apiKeys": {"existingSecret": "k"}, "podMonitor": {"enabled": True}})
    pod = deployment(one)["template"]["spec"]
    (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
    assert volume["secret"]["items"] == [{"key": "keys", "path": "keys"}]
    (config,) = one["objects"]["configmap.yaml"]
    assert 'api_key_file: "/etc/offramp/keys/keys"' in config["data"]["offramp.yaml"]
    (endpoint,) = kube.only(one, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "k", "key": "scrape"}
    assert "API_KEY" in [variable["name"] for variable in smoke(one)["env"]]
    assert 'authorization: Bearer $KEY"' in one["notes"]
    assert "admin" not in config["data"]["offramp.yaml"]
    without = attempt({})
    assert "No API keys" in without["notes"]
    assert "env" not in smoke(without)


def smoke(one: Object) -> Object:
    (found,) = kube.only(one, "Pod")["spec"]["containers"]
    return found


def test_gpus(rendered: dict[str, Object]) -> None:
    pod = deployment(rendered["gpu"])["template"]["spec"]
    main = container(rendered["gpu"])
    assert main["image"].endswith("-gpu")
    assert main["resources"] == {
        "requests": {"cpu": "4", "memory": "4Gi"},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": 1},
    }
    assert pod["nodeSelector"] == {
        "nvidia.com/gpu.present": "true",
        "topology.kubernetes.io/region": "eu",
    }
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert pod["runtimeClassName"] == "nvidia"
    assert "THREADS" not in [variable["name"] for variable in main["env"]]
    assert "nvidia.com/gpu" not in json.dumps(rendered["default"])


def test_the_horizontal_autoscaler(rendered: dict[str, Object]) -> None:
    spec = kube.only(rendered["hpa"], "HorizontalPodAutoscaler")["spec"]
    asked = {
        one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"]
        for one in spec["metrics"]
    }
    assert asked == {"offramp_queue_layer_work": "450", "offramp_engine_busy": "800m"}
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    # And the adapter serves these names.
    text = (ROOT / "deploy/helm/prometheus-adapter-values.yaml").read_text(encoding="utf-8")
    served = set()
    for rule in yaml.safe_load(text)["rules"]["custom"]:
        (series,) = promql.selectors(rule["seriesQuery"])
        name = rule.get("name", {"matches": "^(.*)$", "as": "${1}"})
        served.add(re.sub(name["matches"], name["as"].replace("${1}", r"\1"), series.metric))
        query = rule["metricsQuery"].replace("<<.Series>>", series.metric)
        query = query.replace("<<.LabelMatchers>>", 'pod=~"a|b"').replace("<<.GroupBy>>", "pod")
        assert promql.selectors(query) == {promql.Selector(series.metric, frozenset({"pod"}))}
        assert series.labels == {"namespace", "pod"}
    assert served == asked.keys()
    only_queue = kube.only(rendered["everything"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert len(only_queue) == 1


def test_keda(rendered: dict[str, Object]) -> None:
    spec = kube.only(rendered["keda"], "ScaledObject")["spec"]
    queue, busy = spec["triggers"]
    assert (queue["metadata"]["threshold"], busy["metadata"]["threshold"]) == ("450", "0.75")
    for trigger, metric in (
        (queue, "offramp_queue_layer_work"),
        (busy, "offramp_engine_busy_seconds_total"),
    ):
        assert trigger["authenticationRef"] == {"name": "prometheus-reader"}
        query = trigger["metadata"]["query"]
        assert promql.selectors(query) == {
            promql.Selector(metric, frozenset({"namespace", "pod"})),
        }
        assert 'namespace="offramp"' in query
        pattern = query.split('pod=~"')[1].split('"')[0]
        assert re.fullmatch(pattern, "offramp-7d9f8b6c5d-x2k4j")
        assert not re.fullmatch(pattern, "offramp-two-7d9f8b6c5d-x2k4j")


def test_rules_and_dashboards_are_those_of_the_repository(rendered: dict[str, Object]) -> None:
    objects = rendered["everything"]["objects"]
    rules = {
        one["metadata"]["name"].removeprefix("sentiment-"): one["spec"]
        for one in objects["prometheusrule.yaml"]
    }
    assert rules == {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in promql.RULES
    }
    boards = {
        name: text for one in objects["dashboards.yaml"] for name, text in one["data"].items()
    }
    assert boards == {path.name: path.read_text(encoding="utf-8") for path in promql.BOARDS}
    assert all(
        one["metadata"]["labels"]["grafana_dashboard"] == "1" for one in objects["dashboards.yaml"]
    )


def test_what_schemas_do_not_say(rendered: dict[str, Object]) -> None:
    """Rules of the API server's own, by hand."""
    label = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
    for one in rendered.values():
        objects = kube.objects_of(one)
        for each in objects:
            assert all(label.fullmatch(value) for value in each["metadata"]["labels"].values())
        for pod in kube.pods_of(objects).values():
            containers = kube.containers_of(pod)
            names = [each["name"] for each in (*containers, *pod["volumes"])]
            assert len(set(names)) == len(names)
            assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in names)
            for each in containers:
                paths = [mount["mountPath"] for mount in each["volumeMounts"]]
                assert len(set(paths)) == len(paths)
                assert not any(":" in path for path in paths)
                variables = [variable["name"] for variable in each.get("env", [])]
                assert len(set(variables)) == len(variables)
                assert all(len(port["name"]) <= 15 for port in each.get("ports", []))
                # Requests of what is not CPU or memory follow from limits.
                assert each["resources"]["requests"].keys() == {"cpu", "memory"}


def test_other_namespaces_and_names(attempt: Try) -> None:
    """Kubernetes' limits hold for long names, too, with all that is appended."""
    long = "a" * 80
    one = attempt({"fullnameOverride": long, "nameOverride": long, "autoscaling": {"mode": "hpa"}})
    for each in kube.objects_of(one):
        assert len(each["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in each["metadata"]["labels"].values())


def test_notes(rendered: dict[str, Object]) -> None:
    assert "serves sst2.\n" in rendered["default"]["notes"]
    assert "https://sentiment.example.org/" in rendered["everything"]["notes"]
    assert "port-forward service/sentiment 3000:8080" in rendered["everything"]["notes"]
    assert "must scrape" not in rendered["hpa"]["notes"]


def test_strategy_recreate_leaves_no_rest_of_the_other(attempt: Try) -> None:
    one = attempt({"strategy": {"type": "Recreate"}})
    assert deployment(one)["strategy"] == {"type": "Recreate"}
