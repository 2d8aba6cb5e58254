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

{{- define "tidemark-capture.initContainers" -}}
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
      value: {{ required "tidemark-capture.vault.url is empty: say where the vault is, as http://SERVICE.NAMESPACE.svc:7402" $of.vault.url | quote }}
    # For `kubectl exec … -c tidemark-capture -- tidemark …`
    - name: TIDEMARK_VAULT
      value: {{ $of.vault.url | quote }}
    # There are no certificates in this chart yet.
    - name: CAPTURE_ALLOW_PLAIN_TEXT
      value: "true"
    - name: TIDEMARK_ALLOW_PLAIN_TEXT
      value: "true"
    - name: CAPTURE_STATE
      value: /var/lib/tidemark/capture
    - name: CAPTURE_NBD
      value: {{ ternary "unix:/run/tidemark/nbd.sock" "" (eq $of.frontEnd "nbd") | quote }}
    - name: CAPTURE_ENGINE
      value: {{ ternary "reflink" "intercept" (eq $of.frontEnd "file") }}
    {{- if eq $of.frontEnd "fuse" }}
    - name: CAPTURE_FUSE_MOUNT
      value: /run/tidemark-files/volumes
    {{- end }}
    {{- range $key, $value := $of.settings }}
    - name: CAPTURE_{{ upper $key }}
      {{- if kindIs "float64" $value }}
      value: {{ int64 $value | quote }}
      {{- else }}
      value: {{ $value | quote }}
      {{- end }}
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
{{- end -}}
