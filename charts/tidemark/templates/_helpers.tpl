{{- define "tidemark.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 52: the StatefulSet's pods and their revisions add to it. */}}
{{- define "tidemark.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- printf "%s-vault" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s-vault" .Release.Name (include "tidemark.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tidemark.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tidemark.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: vault
{{- end -}}

{{- define "tidemark.labels" -}}
{{ include "tidemark.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "tidemark.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tidemark.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* What every container may: nothing. */}}
{{- define "tidemark.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "tidemark.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Not empty where the vault speaks TLS. */}}
{{- define "tidemark.tls" -}}
{{- if or .Values.tls.secretName .Values.tls.certManager.enabled }}true{{ end -}}
{{- end -}}

{{- define "tidemark.tlsSecretName" -}}
{{- default (printf "%s-tls" (include "tidemark.fullname" .)) .Values.tls.secretName -}}
{{- end -}}

{{/* The name under which pods of all namespaces reach the vault. */}}
{{- define "tidemark.host" -}}
{{- printf "%s.%s.svc" (include "tidemark.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- define "tidemark.url" -}}
{{- printf "%s://%s:%d" (ternary "https" "http" (eq (include "tidemark.tls" .) "true")) (include "tidemark.host" .) (int .Values.service.port) -}}
{{- end -}}

{{/* What the schema can't say. */}}
{{- define "tidemark.check" -}}
{{- $tls := include "tidemark.tls" . -}}
{{- if and (not $tls) (not .Values.allowPlainText) -}}
{{- fail "the vault has no certificate: name a Secret in tls.secretName, or have cert-manager make one with tls.certManager.enabled=true and tls.certManager.issuerRef.name; allowPlainText=true does without, and lets everybody who reaches it do everything" -}}
{{- end -}}
{{- if and $tls .Values.allowPlainText -}}
{{- fail "allowPlainText=true contradicts tls: the vault has a certificate, so leave allowPlainText out" -}}
{{- end -}}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef.name) -}}
{{- fail "tls.certManager.issuerRef.name is empty: name the Issuer, or the ClusterIssuer, that makes the certificate" -}}
{{- end -}}
{{- range $key, $from := dict "tls.ca" .Values.tls.ca "identitiesFrom" .Values.identitiesFrom -}}
{{- if and $from.secretName $from.configMapName -}}
{{- fail (printf "%s names a Secret and a ConfigMap: name one of them" $key) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.identities (or .Values.identitiesFrom.secretName .Values.identitiesFrom.configMapName) -}}
{{- fail "identities and identitiesFrom are both given: one of them says who may do what" -}}
{{- end -}}
{{- if and (not $tls) (or .Values.identities .Values.identitiesFrom.secretName .Values.identitiesFrom.configMapName) -}}
{{- fail "identities are of no use with allowPlainText: without certificates nobody is asked who they are" -}}
{{- end -}}
{{- if and .Values.settings.otlp_endpoint .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) -}}
{{- fail "settings.otlp_endpoint names a collector, and the network policy keeps the vault from it: give the rule that lets it call the collector in networkPolicy.egress" -}}
{{- end -}}
{{- end -}}

{{/* One key of a Secret or a ConfigMap, as a source of a projected volume: {from, path, default}. */}}
{{- define "tidemark.projected" -}}
- {{ ternary "configMap" "secret" (ne .from.configMapName "") }}:
    name: {{ coalesce .from.configMapName .from.secretName .default }}
    items:
      - key: {{ .from.key }}
        path: {{ .path }}
{{- end -}}

{{/* The CAs, where the vault's certificates are looked at or shown. */}}
{{- define "tidemark.projectedCa" -}}
{{- include "tidemark.projected" (dict "from" .Values.tls.ca "path" "tls/ca.crt" "default" (include "tidemark.tlsSecretName" .)) -}}
{{- end -}}

{{/* vault.toml: the settings, and what the chart decides. Lists and tables have no place in it. */}}
{{- define "tidemark.config" -}}
store_dir = "/var/lib/tidemark/store"
state_dir = "/var/lib/tidemark/state"
{{- if include "tidemark.tls" . }}
tls_cert = "/etc/tidemark/tls/tls.crt"
tls_key = "/etc/tidemark/tls/tls.key"
tls_ca = "/etc/tidemark/tls/ca.crt"
identities = "/etc/tidemark/identities.toml"
{{- else }}
allow_plain_text = true
{{- end }}
{{- range $key, $value := .Values.settings }}
{{- if kindIs "string" $value }}
{{ $key }} = {{ $value | quote }}
{{- else if kindIs "bool" $value }}
{{ $key }} = {{ $value }}
{{- else }}
{{ $key }} = {{ int64 $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Not empty where the list of values is the file of identities. */}}
{{- define "tidemark.ownIdentities" -}}
{{- if and (include "tidemark.tls" .) (not .Values.identitiesFrom.secretName) (not .Values.identitiesFrom.configMapName) }}true{{ end -}}
{{- end -}}

{{/* How Kubernetes asks the service in the container: it knows its own certificate and address. */}}
{{- define "tidemark.health" -}}
exec:
  command: [/usr/bin/vault-svc, health, --timeout={{ . }}]
{{- end -}}
