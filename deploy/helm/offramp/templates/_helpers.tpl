{{- /* Names, labels and paths that more than one template needs. */ -}}

{{- define "offramp.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* Short enough for what Kubernetes and this chart append to it. */ -}}
{{- define "offramp.fullname" -}}
{{- $name := include "offramp.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What the pods of this release are told by; never changes in the life of a Deployment. */ -}}
{{- define "offramp.instance" -}}
app.kubernetes.io/name: {{ include "offramp.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "offramp.selector" -}}
{{ include "offramp.instance" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "offramp.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "offramp.instance" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "offramp.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "offramp.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "offramp.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{- $kind := ternary "gpu" "cpu" .Values.gpu.enabled -}}
{{ .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion $kind) .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- /* What the restricted pod security standard asks of a pod, and of each container. */ -}}
{{- define "offramp.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "offramp.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* Directory of a model in the container. A claim is mounted as a whole: of a mounted part of it
       nobody would see that it was exchanged by renaming. Call with the model. */ -}}
{{- define "offramp.modelDirectory" -}}
{{- if .existingClaim -}}
{{- printf "/models/claims/%s/%s" .existingClaim.name (default "" .existingClaim.path) | trimSuffix "/" -}}
{{- else if .image -}}
{{- printf "/models/images/%s/%s" .name (default "" .image.path) | trimSuffix "/" -}}
{{- else -}}
{{- printf "/models/fetched/%s" .name -}}
{{- end -}}
{{- end -}}

{{- /* The file of --config: one setting a line, values as JSON, which YAML reads. */ -}}
{{- define "offramp.config" -}}
{{- range $name, $value := .Values.config -}}
{{- if not (kindIs "invalid" $value) -}}
{{ $name }}: {{ toJson $value }}
{{ end -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
api_key_file: "/etc/offramp/keys/keys"
{{ if .Values.apiKeys.adminFile -}}
admin_key_file: "/etc/offramp/keys/admin"
{{ end -}}
{{- end -}}
model:
{{- range .Values.models }}
  - {{ printf "%s=%s" .name (include "offramp.modelDirectory" .) | toJson }}
{{- end }}
{{- end -}}

{{- /* Whether a number of port is named in a URL; else what its scheme has. Call with the URL. */ -}}
{{- define "offramp.portOf" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) $port -}}
{{- end -}}

{{- /* The pods of the server alone, whatever other releases are called: name, hash, five letters. */ -}}
{{- define "offramp.podPattern" -}}
{{ include "offramp.fullname" . }}-[a-z0-9]+-[a-z0-9]+
{{- end -}}

{{- define "offramp.scaled" -}}
apiVersion: apps/v1
kind: Deployment
name: {{ include "offramp.fullname" . }}
{{- end -}}
