{{/*
What a chart includes in its pod, each with the chart's own context:

  initContainers:  {{- include "tidemark-capture.initContainers" . | nindent 8 }}
  volumeMounts:    {{- include "tidemark-capture.volumeMounts" . | nindent 12 }}   (of the workload's container)
  volumes:         {{- include "tidemark-capture.volumes" . | nindent 8 }}

The workload finds the NBD socket at /run/tidemark/nbd.sock (frontEnd nbd), its volume files below data.mountPath (file),
or one file per volume below /run/tidemark-files (fuse).
*/}}

{{- define "tidemark-capture.image" -}}
{{- $of := index .Values "tidemark-capture" -}}
{{- $chart := index .Subcharts "tidemark-capture" -}}
{{- printf "%s:%s" $of.image.repository (default $chart.Chart.AppVersion $of.image.tag) | quote -}}
{{- end -}}

{{- define "tidemark-capture.unprivileged" -}}
{{- $of := index .Values "tidemark-capture" -}}
runAsNonRoot: true
runAsUser: {{ int64 $of.runAsUser }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What the schema can't say. */}}
{{- define "tidemark-capture.check" -}}
{{- $of := index .Values "tidemark-capture" -}}
{{- $vault := $of.vault -}}
{{- if not $vault.url -}}
{{- fail "tidemark-capture.vault.url is empty: say where the vault is, as https://SERVICE.NAMESPACE.svc:7402" -}}
{{- end -}}
{{- if hasPrefix "https:" $vault.url -}}
{{- if not $vault.tls.secretName -}}
{{- fail "tidemark-capture.vault.tls.secretName is empty: name the Secret with tls.crt and tls.key, which are shown to the vault, and ca.crt" -}}
{{- end -}}
{{- if $vault.allowPlainText -}}
{{- fail "tidemark-capture.vault.allowPlainText=true contradicts vault.url, which is https: leave it out" -}}
{{- end -}}
{{- else if not $vault.allowPlainText -}}
{{- fail "tidemark-capture.vault.url is http: everything can be read and changed on its way. Write https, or allow it with vault.allowPlainText=true" -}}
{{- else if $vault.tls.secretName -}}
{{- fail "tidemark-capture.vault.tls.secretName is of no use while vault.url is http: write https" -}}
{{- end -}}
{{- if and $vault.tls.ca.secretName $vault.tls.ca.configMapName -}}
{{- fail "tidemark-capture.vault.tls.ca names a Secret and a ConfigMap: name one of them" -}}
{{- end -}}
{{- if and (eq $of.frontEnd "file") (eq $of.engine "intercept") -}}
{{- fail "tidemark-capture.engine intercept sees no write with frontEnd file: take reflink, scan or auto, or frontEnd nbd or fuse" -}}
{{- end -}}
{{- if and (ne $of.frontEnd "file") (has $of.engine (list "reflink" "scan")) -}}
{{- fail (printf "tidemark-capture.engine %s is for a workload that writes the file itself: take frontEnd file, or engine intercept or auto" $of.engine) -}}
{{- end -}}
{{- end -}}

{{- define "tidemark-capture.initContainers" -}}
{{- include "tidemark-capture.check" . -}}
{{- $of := index .Values "tidemark-capture" -}}
- name: tidemark-capture
  image: {{ include "tidemark-capture.image" . }}
  imagePullPolicy: {{ $of.image.pullPolicy }}
  # A native sidecar: it is up before the workload starts, and ends after it.
  restartPolicy: Always
  env:
    - name: POD_NAMESPACE
      valueFrom:
        fieldRef: { fieldPath: metadata.namespace }
    - name: POD_NAME
      valueFrom:
        fieldRef: { fieldPath: metadata.name }
    - name: CAPTURE_SOURCE_NAME
      value: {{ default "$(POD_NAMESPACE)/$(POD_NAME)" $of.sourceName | quote }}
    - name: CAPTURE_VAULT
      value: {{ $of.vault.url | quote }}
    # For `kubectl exec … -c tidemark-capture -- tidemark …`
    - name: TIDEMARK_VAULT
      value: {{ $of.vault.url | quote }}
    {{- if $of.vault.allowPlainText }}
    - name: CAPTURE_ALLOW_PLAIN_TEXT
      value: "true"
    - name: TIDEMARK_ALLOW_PLAIN_TEXT
      value: "true"
    {{- else }}
    {{- range list "CAPTURE_VAULT" "TIDEMARK_TLS" }}
    - name: {{ . }}_CA
      value: /etc/tidemark/ca.crt
    - name: {{ . }}_CERT
      value: /etc/tidemark/tls.crt
    - name: {{ . }}_KEY
      value: /etc/tidemark/tls.key
    {{- end }}
    {{- end }}
    - name: CAPTURE_STATE
      value: /var/lib/tidemark/capture
    - name: CAPTURE_NBD
      value: {{ ternary "unix:/run/tidemark/nbd.sock" "" (eq $of.frontEnd "nbd") | quote }}
    - name: CAPTURE_ENGINE
      value: {{ $of.engine }}
    {{- if eq $of.frontEnd "fuse" }}
    - name: CAPTURE_FUSE_MOUNT
      value: /run/tidemark-files/volumes
    {{- end }}
    {{- if $of.metrics.enabled }}
    - name: CAPTURE_METRICS_LISTEN
      value: 0.0.0.0:{{ int64 $of.metrics.port }}
    - name: CAPTURE_METRICS_PLAIN_TEXT
      value: "true"
    {{- end }}
    {{- range $key, $value := $of.settings }}
    - name: CAPTURE_{{ upper $key }}
      {{- if kindIs "float64" $value }}
      value: {{ int64 $value | quote }}
      {{- else }}
      value: {{ $value | quote }}
      {{- end }}
    {{- end }}
  {{- if $of.metrics.enabled }}
  ports:
    - name: tidemark-metric
      containerPort: {{ int64 $of.metrics.port }}
      protocol: TCP
  {{- end }}
  securityContext:
    {{- if eq $of.frontEnd "fuse" }}
    # Bidirectional propagation of a mount takes a privileged container.
    privileged: true
    runAsUser: 0
    runAsNonRoot: false
    readOnlyRootFilesystem: true
    {{- else }}
    {{- include "tidemark-capture.unprivileged" . | nindent 4 }}
    {{- end }}
  # The control interface is on the loopback, where the service asks itself.
  startupProbe:
    exec: { command: [/usr/bin/capture-svc, health] }
    periodSeconds: 2
    failureThreshold: 150
    timeoutSeconds: 5
  readinessProbe:
    exec: { command: [/usr/bin/capture-svc, health] }
    periodSeconds: 10
    timeoutSeconds: 5
  livenessProbe:
    exec: { command: [/usr/bin/capture-svc, health, --timeout=8s] }
    periodSeconds: 20
    failureThreshold: 6
    timeoutSeconds: 10
  {{- with $of.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - name: {{ default "tidemark-state" $of.state.volume }}
      mountPath: /var/lib/tidemark
      {{- with $of.state.subPath }}
      subPath: {{ . }}
      {{- end }}
    {{- include "tidemark-capture.dataMount" . | nindent 4 }}
    {{- if not $of.vault.allowPlainText }}
    - name: tidemark-tls
      mountPath: /etc/tidemark
      readOnly: true
    {{- end }}
    {{- if eq $of.frontEnd "nbd" }}
    - name: tidemark-run
      mountPath: /run/tidemark
    {{- else if eq $of.frontEnd "fuse" }}
    - name: tidemark-files
      mountPath: /run/tidemark-files
      mountPropagation: Bidirectional
    {{- end }}
{{- range $of.volumes }}
# It changes nothing where the volume is protected already.
- name: tidemark-protect-{{ .name }}
  image: {{ include "tidemark-capture.image" $ }}
  imagePullPolicy: {{ $of.image.pullPolicy }}
  command: [/usr/bin/tidemark]
  args:
    - volume
    - add
    - {{ .name | quote }}
    - --file={{ printf "%s/%s" (trimSuffix "/" $of.data.mountPath) .file }}
    {{- with .size }}
    - --size={{ . }}
    {{- end }}
    {{- with .blockSize }}
    - --block-size={{ . }}
    {{- end }}
    - --if-missing
  securityContext:
    {{- include "tidemark-capture.unprivileged" $ | nindent 4 }}
  resources:
    requests: { cpu: 10m, memory: 32Mi }
    limits: { memory: 128Mi }
{{- end }}
{{- end -}}

{{- define "tidemark-capture.dataMount" -}}
{{- $of := index .Values "tidemark-capture" -}}
- name: {{ $of.data.volume }}
  mountPath: {{ $of.data.mountPath }}
  {{- with $of.data.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end -}}

{{- define "tidemark-capture.volumeMounts" -}}
{{- $of := index .Values "tidemark-capture" -}}
{{- if eq $of.frontEnd "nbd" -}}
- name: tidemark-run
  mountPath: /run/tidemark
{{- else if eq $of.frontEnd "fuse" -}}
- name: tidemark-files
  mountPath: /run/tidemark-files
  mountPropagation: HostToContainer
{{- else -}}
{{- include "tidemark-capture.dataMount" . }}
{{- end -}}
{{- end -}}

{{- define "tidemark-capture.volumes" -}}
{{- $of := index .Values "tidemark-capture" -}}
{{- if eq $of.frontEnd "nbd" -}}
- name: tidemark-run
  emptyDir:
    sizeLimit: 1Mi
{{- else if eq $of.frontEnd "fuse" -}}
- name: tidemark-files
  emptyDir: {}
{{- end }}
{{- if not $of.state.volume }}
- name: tidemark-state
  emptyDir: {}
{{- end }}
{{- with $of.vault }}
{{- if not .allowPlainText }}
- name: tidemark-tls
  projected:
    # The sidecar alone mounts it, as a user of whom the pod may know nothing.
    defaultMode: 0444
    sources:
      - secret:
          name: {{ .tls.secretName }}
          items:
            - key: tls.crt
              path: tls.crt
            - key: tls.key
              path: tls.key
      - {{ ternary "configMap" "secret" (ne .tls.ca.configMapName "") }}:
          name: {{ coalesce .tls.ca.configMapName .tls.ca.secretName .tls.secretName }}
          items:
            - key: {{ .tls.ca.key }}
              path: ca.crt
{{- end }}
{{- end }}
{{- end -}}
