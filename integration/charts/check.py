#!/usr/bin/env python3
"""Holds the charts to a real Helm and to the schemas of Kubernetes.

Each chart is linted, rendered with the values of each case, compared with the render kept in golden/, and every object of
the render is validated, strictly, against the schemas of several releases of Kubernetes; one of a kind that Kubernetes itself
doesn't have, against the schema in crds/. Values that can't be meant must be refused with a message that names them.

    check.py            says what is wrong, and ends with 1 if anything is
    check.py --update   writes the renders to golden/ instead of comparing them
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).resolve().parent
CHARTS = HERE.parent.parent / "charts"
GOLDEN = HERE / "golden"
CRDS = HERE / "crds"
RELEASES = ["1.29", "1.31", "1.33", "1.35", "1.37"]
NAMESPACE = "backup"

CAPTURE = "tidemark-capture"

PLAIN_TEXT = {"allowPlainText": True}
SECRET = {"tls": {"secretName": "vault-tls"}}
EDGE = {"name": "edge-7", "roles": ["source"], "volumes": ["*"]}
DASHBOARD = {"name": "dashboard", "roles": ["viewer"], "volumes": ["*"], "token_sha256": "0a" * 32}
COLLECTOR = {
    "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    "ports": [{"port": 4317, "protocol": "TCP"}],
}
PLAIN_URL = "http://tidemark-vault.tidemark.svc:7402"


def cert_manager(**more):
    return {"certManager": {"enabled": True, "issuerRef": {"name": "site", "kind": "ClusterIssuer"}, **more}}


def vault(**more):
    return {CAPTURE: {"vault": more}}


# With these each chart is linted: the vault's has no default that says who may connect.
LINTED = {"tidemark": SECRET}

# chart, name of the case, release, values
RENDERED = [
    ("tidemark", "secret", "tidemark", SECRET | {"identities": [EDGE, DASHBOARD]}),
    ("tidemark", "cert-manager", "tidemark", {"tls": cert_manager()}),
    (
        "tidemark",
        "everything",
        "north",
        {
            "image": {"repository": "registry.example/tidemark-vault", "tag": "1.2.3", "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "registry"}],
            "settings": {
                "retain": 24,
                "scrub_period": "3d",
                "volume_bytes_max": "2TiB",
                "otlp_endpoint": "http://collector.monitoring.svc:4317",
            },
            "tls": {
                "secretName": "north-vault-tls",
                **cert_manager(dnsNames=["vault.example.com"], ipAddresses=["192.0.2.7"], renewBefore="240h"),
                "ca": {"configMapName": "site-ca", "key": "ca-bundle.crt"},
            },
            "identitiesFrom": {"secretName": "who-is-who"},
            "service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}},
            "persistence": {"size": "2Ti", "storageClassName": "fast", "annotations": {"c": "d"}},
            "serviceAccount": {"create": False, "name": "vaults"},
            "networkPolicy": {
                "from": [{"namespaceSelector": {"matchLabels": {"tidemark": "source"}}}],
                "egress": [COLLECTOR],
            },
            "podDisruptionBudget": {"maxUnavailable": 0},
            "metrics": {
                "port": 9999,
                "from": [{"namespaceSelector": {"matchLabels": {"monitors": "all"}}}],
                "serviceMonitor": {"enabled": True, "interval": "10s", "labels": {"release": "monitoring"}},
                "prometheusRule": {"enabled": True, "labels": {"release": "monitoring"}, "runbook": "https://wiki.example/tidemark"},
                "dashboard": {"enabled": True, "annotations": {"folder": "Storage"}},
            },
            "podAnnotations": {"e": "f"},
            "podLabels": {"g": "h"},
            "nodeSelector": {"disk": "large"},
            "tolerations": [{"key": "storage", "operator": "Exists"}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["n"]}]}]
                    }
                }
            },
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
            "priorityClassName": "storage",
            "extraEnv": [{"name": "VAULT_LOG", "value": "debug"}],
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
    ),
    (
        "tidemark",
        "least",
        "tidemark",
        PLAIN_TEXT | {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}, "resources": None}
        | {"metrics": {"enabled": False}},
    ),
    ("example-app", "nbd", "diary", {}),
    (
        "example-app",
        "file",
        "diary",
        {
            CAPTURE: {
                "frontEnd": "file",
                "engine": "reflink",
                "state": {"volume": "", "subPath": ""},
                "settings": {"cut_stall_max": "2s"},
                "metrics": {"enabled": False},
                "vault": {"tls": {"secretName": "diary-tls", "ca": {"configMapName": "site-ca", "key": "ca-bundle.crt"}}},
            },
            "certificate": {"issuerRef": {"name": "site"}},
        },
    ),
    (
        "example-app",
        "fuse",
        "diary",
        {
            CAPTURE: {
                "frontEnd": "fuse",
                "engine": "intercept",
                "sourceName": "diary",
                "vault": {"url": PLAIN_URL, "allowPlainText": True, "tls": {"secretName": ""}},
            }
        },
    ),
    ("example-app", "scan", "diary", {CAPTURE: {"frontEnd": "file", "engine": "scan"}}),
]

# chart, values, what the refusal must name
REFUSED = [
    ("tidemark", {}, "the vault has no certificate"),
    ("tidemark", {"tls": {"certManager": {"enabled": True}}}, "issuerRef.name is empty"),
    ("tidemark", SECRET | PLAIN_TEXT, "contradicts tls"),
    ("tidemark", PLAIN_TEXT | {"identities": [EDGE]}, "of no use with allowPlainText"),
    ("tidemark", SECRET | {"identities": [EDGE], "identitiesFrom": {"secretName": "a"}}, "both given"),
    ("tidemark", SECRET | {"identitiesFrom": {"secretName": "a", "configMapName": "b"}}, "identitiesFrom names a Secret and"),
    ("tidemark", {"tls": SECRET["tls"] | {"ca": {"secretName": "a", "configMapName": "b"}}}, "tls.ca names a Secret and"),
    ("tidemark", SECRET | {"identities": [EDGE | {"roles": ["owner"]}]}, "roles"),
    ("tidemark", SECRET | {"identities": [EDGE | {"volumes": []}]}, "volumes"),
    ("tidemark", SECRET | {"identities": [EDGE | {"volumes": ["edge-7/"]}]}, "volumes"),
    ("tidemark", SECRET | {"identities": [EDGE | {"token": "secret"}]}, "token"),
    ("tidemark", SECRET | {"identities": [EDGE | {"token_sha256": "0A"}]}, "token_sha256"),
    ("tidemark", {"tls": {"secretName": "Vault_TLS"}}, "secretName"),
    ("tidemark", {"tls": {"cert": "a.crt"}}, "cert"),
    ("tidemark", {"tls": cert_manager(duration="90d")}, "duration"),
    ("tidemark", {"tls": cert_manager(dnsNames=["https://vault"])}, "dnsNames"),
    ("tidemark", {"allowPlainText": "yes"}, "allowPlainText"),
    ("tidemark", {"settings": {"allow_plain_text": True}}, "allow_plain_text"),
    ("tidemark", {"settings": {"tls_cert": "/a.crt"}}, "tls_cert"),
    ("tidemark", {"replicas": 3}, "replicas"),
    ("tidemark", {"service": {"port": 70000}}, "port"),
    ("tidemark", {"service": {"type": "ExternalName"}}, "type"),
    ("tidemark", {"persistence": {"size": "much"}}, "size"),
    ("tidemark", {"persistence": {"accessModes": ["ReadOnlyMany"]}}, "accessModes"),
    ("tidemark", {"settings": {"listen": "0.0.0.0:1"}}, "listen"),
    ("tidemark", {"settings": {"retain": 0}}, "retain"),
    ("tidemark", {"settings": {"retain": "many"}}, "retain"),
    ("tidemark", {"image": {"repository": ""}}, "repository"),
    ("tidemark", {"networkPolicy": {"from": [{}]}}, "from"),
    ("tidemark", {"networkPolicy": {"egress": [{}]}}, "egress"),
    ("tidemark", {"networkPolicy": {"egress": [{"from": COLLECTOR["to"]}]}}, "egress"),
    ("tidemark", SECRET | {"settings": {"otlp_endpoint": "http://collector:4317"}}, "networkPolicy.egress"),
    ("tidemark", {"metrics": {"port": 7402}}, "port"),
    ("tidemark", {"metrics": {"serviceMonitor": {"interval": "often"}}}, "interval"),
    ("tidemark", {"settings": {"metrics_listen": "0.0.0.0:1"}}, "metrics_listen"),
    ("tidemark", {"podDisruptionBudget": {"maxUnavailable": 2}}, "maxUnavailable"),
    ("example-app", {CAPTURE: {"frontEnd": "iscsi"}}, "frontEnd"),
    ("example-app", {CAPTURE: {"frontEnd": "file", "engine": "intercept"}}, "intercept sees no write"),
    ("example-app", {CAPTURE: {"engine": "reflink"}}, "engine reflink is for a workload that writes the file itself"),
    ("example-app", {CAPTURE: {"frontEnd": "fuse", "engine": "scan"}}, "engine scan is for a workload"),
    ("example-app", {CAPTURE: {"engine": "clone"}}, "engine"),
    ("example-app", vault(url=""), "vault.url is empty"),
    ("example-app", vault(url="vault"), "url"),
    ("example-app", vault(tls={"secretName": ""}), "vault.tls.secretName is empty"),
    ("example-app", vault(url=PLAIN_URL), "vault.url is http"),
    ("example-app", vault(url=PLAIN_URL, allowPlainText=True), "of no use while vault.url is http"),
    ("example-app", vault(allowPlainText=True), "contradicts vault.url"),
    ("example-app", vault(tls={"ca": {"secretName": "a", "configMapName": "b"}}), "names a Secret and a ConfigMap"),
    ("example-app", vault(tls={"ca": {"key": "a b"}}), "key"),
    ("example-app", {CAPTURE: {"settings": {"vault_key": "/a.key"}}}, "vault_key"),
    ("example-app", {CAPTURE: {"volumes": [{"name": "Data", "file": "d.img"}]}}, "name"),
    ("example-app", {CAPTURE: {"volumes": [{"name": "data", "file": "/d.img"}]}}, "file"),
    ("example-app", {CAPTURE: {"volumes": [{"name": "data"}]}}, "file"),
    ("example-app", {CAPTURE: {"settings": {"nbd": "tcp:0.0.0.0:10809"}}}, "nbd"),
    ("example-app", {CAPTURE: {"metrics": {"port": 7401}}}, "port"),
    ("example-app", {CAPTURE: {"settings": {"metrics_listen": ""}}}, "metrics_listen"),
    ("example-app", {CAPTURE: {"runAsUser": 0}}, "runAsUser"),
]

problems = []


def charts_with_their_dependencies(work):
    """What `helm dependency update` does for a dependency in the folder beside."""
    shutil.copytree(CHARTS, work / "charts")
    shutil.copytree(CHARTS / CAPTURE, work / "charts/example-app/charts" / CAPTURE)
    return work / "charts"


def lint(charts):
    for chart in sorted(path.name for path in charts.iterdir()):
        report = helm_python.lint(charts / chart, LINTED.get(chart), strict=True, namespace=NAMESPACE)
        for message in report["messages"]:
            # That there is no icon is told, too.
            if message["severity"] >= 2:
                problems.append(f"{chart}: lint: {message['path']}: {message['error']}")


def render(charts, chart, release, values):
    with helm_python.Chart.load(charts / chart) as loaded:
        loaded.validate_schema(values)
        manifests = loaded.render(values, name=release, namespace=NAMESPACE)
    kept = {path: text.strip() for path, text in sorted(manifests.items()) if text.strip()}
    return "".join(f"---\n# {path}\n{text}\n" for path, text in kept.items())


def objects(text):
    """Every object of a render; its notes are none."""
    for part in text.split("---\n# ")[1:]:
        path, body = part.split("\n", 1)
        if not path.endswith("NOTES.txt"):
            yield from ((path, one) for one in yaml.safe_load_all(body) if one)


def compare(name, text, update):
    golden = GOLDEN / f"{name}.yaml"
    if update:
        golden.write_text(text)
    elif not golden.exists() or golden.read_text() != text:
        problems.append(f"{name}: the render is another than {golden.relative_to(HERE)}; look, then check.py --update")


def schemas_of_crds():
    """By apiVersion and kind."""
    schemas = [json.loads(path.read_text()) for path in sorted(CRDS.glob("*.json"))]
    return {tuple(of["properties"][key]["const"] for key in ("apiVersion", "kind")): of for of in schemas}


def validate(name, text, crds):
    for path, one in objects(text):
        if schema := crds.get((one["apiVersion"], one["kind"])):
            for error in jsonschema.Draft7Validator(schema).iter_errors(one):
                problems.append(f"{name}: {path}: {error.json_path}: {error.message}")
            continue
        for release in RELEASES:
            try:
                kubernetes_validate.validate(one, release, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(map(str, error.path))
                problems.append(f"{name}: {path} for Kubernetes {release}: {where}: {error.message}")


def refuse(charts, chart, values, named):
    try:
        render(charts, chart, "bad", values)
    except helm_python.HelmError as error:
        if named not in str(error):
            problems.append(f"{chart} {values}: refused without naming {named!r}: {error}")
    else:
        problems.append(f"{chart} {values}: not refused")


def main():
    update = sys.argv[1:] == ["--update"]
    crds = schemas_of_crds()
    with tempfile.TemporaryDirectory() as work:
        charts = charts_with_their_dependencies(Path(work))
        lint(charts)
        for chart, case, release, values in RENDERED:
            name = f"{chart}-{case}"
            text = render(charts, chart, release, values)
            compare(name, text, update)
            validate(name, text, crds)
        for chart, values, named in REFUSED:
            refuse(charts, chart, values, named)
    for problem in problems:
        print(problem)
    print(f"{len(RENDERED)} renders, {len(REFUSED)} refusals, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
