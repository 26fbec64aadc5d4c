#!/usr/bin/env bash
# Runs ivideo.main on GKE, as a JobSet of TPU hosts that Kubernetes restarts after preemptions.
#
#   launch/gke.sh render NAME --image=IMAGE --accelerator=tpu-v6e-slice --topology=8x8 --hosts=16 -- --config=configs/ssr2.py --workdir=DIR …
#   launch/gke.sh apply  NAME …the same…
#   launch/gke.sh xpk    NAME --image=IMAGE --cluster=CLUSTER --zone=ZONE --type=v6e-64 -- …
#   launch/gke.sh delete NAME
#
# `render` prints the manifest, `apply` passes it to kubectl; the cluster needs JobSet. `xpk` submits the run with Google's xpk to
# a cluster that xpk created. --chips=4 is the number of chips per host. The --workdir must be storage that all hosts share, such
# as a bucket that the image mounts. The image must have this checkout in its working folder, installed with '.[tpu]'.
# A process that receives a stop signal saves within --grace=120 s, and the JobSet restarts, at most 50 times (--restarts). Exit
# codes 1, 2 and 130 end it, because it would only fail again. --dry_run, or DRY_RUN=1, prints the commands without running them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

[[ $# -gt 0 ]] || fail "no action: expected render, apply, xpk or delete; see --help"
case $1 in -h | --help) usage && exit 0 ;; esac
action=$1
shift
case $action in render | apply | xpk | delete) ;; *) fail "action '$action' is unknown: expected render, apply, xpk or delete" ;; esac
[[ $# -gt 0 && $1 != -* ]] || fail "no name: expected launch/gke.sh $action NAME …"
name=$1
shift
[[ $name =~ ^[a-z]([a-z0-9-]{0,36}[a-z0-9])?$ ]] ||
  fail "NAME='$name': expected at most 38 lowercase letters, digits and hyphens, with a letter first and no hyphen last"
image='' accelerator='' topology='' hosts='' chips=4 cluster='' zone='' type='' restarts=50 grace=120
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --image=* | --accelerator=* | --topology=* | --hosts=* | --chips=* | --cluster=* | --zone=* | --type=* | --restarts=* | --grace=*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --dry_run) export DRY_RUN=1 ;;
    --) shift && rest=("$@") && break ;;
    *) fail "'$1' is unknown: expected --image=, --accelerator=, --topology=, --hosts=, --chips=, --cluster=, --zone=, --type=, --restarts=, --grace=, --dry_run, and -- before the arguments of ivideo.main" ;;
  esac
  shift
done

needed() { # fails if an option is missing
  local option
  for option in "$@"; do
    [[ -n ${!option} ]] || fail "--$option is missing: $action needs $(printf -- '--%s ' "$@")"
  done
}

json() { # quotes a string as JSON, which is valid YAML
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t} text=${text//$'\r'/\\r}
  [[ $text != *[[:cntrl:]]* ]] || fail "$(printf '%q' "$1") contains a control character: remove it"
  printf '"%s"' "$text"
}

check_image() {
  [[ $image != *[[:space:][:cntrl:]]* && $image != -* ]] || fail "--image=$image: expected an image's name, such as europe-docker.pkg.dev/me/ivideo:1"
}

needs_kubectl() {
  needs kubectl "gcloud components install kubectl, or see https://kubernetes.io/docs/tasks/tools"
}

chips_in() { # the number of chips of a topology
  local product=1 size
  for size in ${1//x/ }; do product=$((product * size)); done
  echo "$product"
}

check_slice() { # checks options whose errors Kubernetes would report after minutes, or never
  local number dimensions=''
  is_number "$hosts" 1 100000 || fail "--hosts=$hosts: expected the slice's number of hosts, from 1"
  is_number "$chips" 1 100 || fail "--chips=$chips: expected the number of chips of a host, such as 4"
  for number in restarts grace; do
    is_number "${!number}" 0 1000000 || fail "--$number=${!number}: expected a number, from 0"
  done
  [[ $accelerator =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "--accelerator=$accelerator: expected a GKE accelerator name, such as tpu-v6e-slice"
  [[ $topology =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
    fail "--topology=$topology: expected the number of chips along each dimension, such as 8x8 or 4x4x4"
  case $accelerator in
    tpu-v5-lite-* | tpu-v6e-*) dimensions=2 ;;
    tpu-v4-* | tpu-v5p-* | tpu7x*) dimensions=3 ;;
  esac
  local crosses=${topology//[!x]/}
  [[ -z $dimensions || $((${#crosses} + 1)) == "$dimensions" ]] ||
    fail "--topology=$topology: slices of $accelerator have $dimensions dimensions"
  number=$(chips_in "$topology")
  ((number == hosts * chips)) ||
    fail "--topology=$topology has $number chips, but --hosts=$hosts of --chips=$chips have $((hosts * chips)): a run uses the whole slice"
}

manifest() {
  local argument final="${FINAL[*]}" arguments='"-m", "ivideo.main", "--distributed"'
  # Kubernetes replaces $(NAME) by a variable; $$ is an escaped $
  for argument in "${rest[@]}"; do arguments+=", $(json "${argument//\$(/\$\$(}")" || exit 2; done
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  # If a host fails, all hosts restart from the newest checkpoint
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - name: final
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: host
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        # An error in the command, or too many non-finite updates: a restart would only fail again
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: ivideo
              operator: In
              values: [${final// /, }]
        template:
          spec:
            restartPolicy: Never # podFailurePolicy requires it
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
              cloud.google.com/gke-tpu-topology: $(json "$topology")
            containers:
            - name: ivideo
              image: $(json "$image")
              # No shell in between, so that Python gets the stop signal
              command: ["python"]
              args: [$arguments]
              ports:
              - containerPort: 8471
              - containerPort: 8476
              resources:
                requests: {google.com/tpu: $chips}
                limits: {google.com/tpu: $chips}
END
}

if [[ $action != delete ]]; then
  [[ ${#rest[@]} -gt 0 ]] || fail "no arguments of ivideo.main: give them after --, such as -- --config=configs/ssr2.py --workdir=DIR"
fi
case $action in
  render | apply)
    needed image accelerator topology hosts
    check_image
    check_slice
    text=$(manifest)
    [[ $action == render ]] || needs_kubectl
    if [[ $action == render || -n ${DRY_RUN:-} ]]; then echo "$text"; fi
    if [[ $action == apply ]]; then run kubectl apply -f - <<<"$text"; fi
    ;;
  xpk)
    needed image cluster zone type
    check_image
    is_number "$restarts" 0 1000000 || fail "--restarts=$restarts: expected a number, from 0"
    needs xpk "pip install xpk, in an environment of its own"
    codes=${RESUMABLE[*]}
    run xpk workload create "--workload=$name" "--cluster=$cluster" "--zone=$zone" "--tpu-type=$type" \
      "--docker-image=$image" "--max-restarts=$restarts" "--restart-on-exit-codes=${codes// /,}" \
      "--command=exec python -m ivideo.main --distributed $(quoted "${rest[@]}")"
    ;;
  delete)
    needs_kubectl
    run kubectl delete jobset "$name"
    ;;
esac
