{{- define "di.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "di.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-gpu" "" (gt (int .Values.workers.gpus) 0))) }}
{{- end }}

{{- define "di.scheduler" -}}
{{ ternary "tls" "tcp" .Values.tls.enabled }}://{{ include "di.name" . }}-scheduler:8786
{{- end }}

{{- define "di.selector" -}}
app.kubernetes.io/name: dask-influence
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "di.labels" -}}
{{ include "di.selector" . }}
app.kubernetes.io/part-of: dask-influence
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What every pod has. */}}
{{- define "di.pod" -}}
serviceAccountName: {{ include "di.name" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* What every container has. */}}
{{- define "di.container" -}}
image: {{ include "di.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "di.tls.args" -}}
{{- if .Values.tls.enabled }}
- --tls-ca-file=/tls/ca.crt
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- end }}
{{- end }}

{{- define "di.tls.mount" -}}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "di.tls.volume" -}}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ .Values.tls.secretName }}, defaultMode: 288} # 0440: owner and fsGroup
{{- end }}
{{- end }}

{{- define "di.data.mount" -}}
{{- if .Values.persistence.enabled }}
- {name: data, mountPath: /data}
{{- end }}
{{- end }}

{{- define "di.data.volume" -}}
{{- if .Values.persistence.enabled }}
- name: data
  persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim | default (printf "%s-data" (include "di.name" .)) }}}
{{- end }}
{{- end }}

{{- define "di.s3.env" -}}
{{- if .Values.s3.enabled }}
envFrom:
  - secretRef: {name: {{ .Values.s3.secretName }}}
{{- end }}
{{- end }}

{{/* The pod of the scheduler. */}}
{{- define "di.scheduler.spec" -}}
{{ include "di.pod" . }}
terminationGracePeriodSeconds: 30
containers:
  - name: scheduler
    {{- include "di.container" . | nindent 4 }}
    command: [dask, scheduler]
    args:
      - --port=8786
      - --dashboard-address=:8787
      {{- include "di.tls.args" . | nindent 6 }}
      {{- if .Values.tls.enabled }}
      - --protocol=tls
      {{- end }}
    {{- if .Values.operator.enabled }}
    env: # the operator asks over HTTP how many workers there should be
      - name: DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES
        value: "['distributed.http.scheduler.prometheus', 'distributed.http.scheduler.info', 'distributed.http.scheduler.json', 'distributed.http.health', 'distributed.http.proxy', 'distributed.http.statics', 'distributed.http.scheduler.api']"
    {{- end }}
    ports:
      - {name: tcp-comm, containerPort: 8786}
      - {name: http-dashboard, containerPort: 8787}
    resources:
      requests: {cpu: {{ .Values.scheduler.cpu | quote }}, memory: {{ .Values.scheduler.memoryMiB }}Mi}
      limits: {cpu: {{ .Values.scheduler.cpu | quote }}, memory: {{ .Values.scheduler.memoryMiB }}Mi}
    startupProbe:
      httpGet: {path: /health, port: http-dashboard}
      periodSeconds: 2
      failureThreshold: 60
    readinessProbe:
      httpGet: {path: /health, port: http-dashboard}
      periodSeconds: 5
      timeoutSeconds: 5
    livenessProbe:
      httpGet: {path: /health, port: http-dashboard}
      periodSeconds: 20
      timeoutSeconds: 10
      failureThreshold: 6
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- include "di.tls.mount" . | nindent 6 }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 256Mi}
  {{- include "di.tls.volume" . | nindent 2 }}
{{- end }}

{{/* The pod of a worker. */}}
{{- define "di.worker.spec" -}}
{{ include "di.pod" . }}
terminationGracePeriodSeconds: 60
{{- with .Values.workers.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.workers.gpus .Values.workers.tolerations }}
tolerations:
  {{- if .Values.workers.gpus }}
  - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
  {{- end }}
  {{- with .Values.workers.tolerations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "di.selector" . | nindent 8 }}
        app.kubernetes.io/component: worker
containers:
  - name: worker
    {{- include "di.container" . | nindent 4 }}
    command: [dask, worker]
    args:
      {{- if .Values.operator.enabled }}
      - --name=$(DASK_WORKER_NAME)
      {{- end }}
      - --nthreads=1
      - --memory-limit={{ div (mul .Values.workers.memoryMiB 7) 8 }}MiB
      - --death-timeout=120
      - --local-directory=/scratch
      - --worker-port=8788
      - --nanny-port=8789
      - --dashboard-address=:8790
      {{- include "di.tls.args" . | nindent 6 }}
      {{- if .Values.tls.enabled }}
      - --protocol=tls
      {{- end }}
    env:
      - {name: DASK_SCHEDULER_ADDRESS, value: {{ include "di.scheduler" . | quote }}}
      - {name: OMP_NUM_THREADS, value: {{ .Values.workers.cpu | quote }}}
      - {name: MKL_NUM_THREADS, value: {{ .Values.workers.cpu | quote }}}
      - {name: OPENBLAS_NUM_THREADS, value: {{ .Values.workers.cpu | quote }}}
      - {name: MALLOC_TRIM_THRESHOLD_, value: "65536"}
    {{- include "di.s3.env" . | nindent 4 }}
    ports:
      - {name: worker, containerPort: 8788}
      - {name: nanny, containerPort: 8789}
      - {name: http-dashboard, containerPort: 8790}
    {{- $resources := dict "cpu" (toString .Values.workers.cpu) "memory" (printf "%dMi" (int .Values.workers.memoryMiB)) }}
    {{- if .Values.workers.gpus }}{{ $_ := set $resources "nvidia.com/gpu" (toString .Values.workers.gpus) }}{{ end }}
    resources:
      requests: {{ merge (dict "ephemeral-storage" .Values.workers.scratch) $resources | toYaml | nindent 8 }}
      limits: {{ toYaml $resources | nindent 8 }}
    startupProbe:
      httpGet: {path: /health, port: http-dashboard}
      periodSeconds: 5
      failureThreshold: 60
    livenessProbe:
      httpGet: {path: /health, port: http-dashboard}
      periodSeconds: 30
      timeoutSeconds: 15
      failureThreshold: 10
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: scratch, mountPath: /scratch}
      {{- include "di.data.mount" . | nindent 6 }}
      {{- include "di.tls.mount" . | nindent 6 }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 256Mi}
  - name: scratch
    emptyDir: {sizeLimit: {{ .Values.workers.scratch }}}
  {{- include "di.data.volume" . | nindent 2 }}
  {{- include "di.tls.volume" . | nindent 2 }}
{{- end }}
