#!/usr/bin/env bash
# A training run on GKE: a JobSet of TPU hosts, which Kubernetes starts again when they go away.
#
#   launch/gke.sh render NAME --image=IMAGE --accelerator=tpu-v6e-slice --topology=8x8 --hosts=16 -- --config=configs/ssr2.py --workdir=DIR …
#   launch/gke.sh apply  NAME …the same…
#   launch/gke.sh xpk    NAME --image=IMAGE --cluster=CLUSTER --zone=ZONE --type=v6e-64 -- …
#   launch/gke.sh delete NAME
#
# `render` prints the manifest (JobSet has to be installed in the cluster), `apply` hands it to kubectl; `xpk` does with
# Google's xpk what it does to a cluster that xpk made. --chips=4 is a host's. The --workdir is storage that all hosts share,
# such as a bucket mounted by the image. A process told to stop saves within --grace=120 s and the JobSet starts again, 50
# times at most (--restarts); exit codes 1 and 2, mistakes that would be made again, end it. The image has this checkout in
# its working folder, installed with '.[tpu]'. --dry_run, or DRY_RUN=1, prints the commands and runs none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

[[ $# -gt 0 ]] || fail "no action: expected render, apply, xpk or delete; see --help"
case $1 in -h | --help) usage && exit 0 ;; esac
action=$1
shift
case $action in render | apply | xpk | delete) ;; *) fail "action '$action' is unknown: expected render, apply, xpk or delete" ;; esac
[[ $# -gt 0 && $1 != -* ]] || fail "no name: expected launch/gke.sh $action NAME …"
name=$1
shift
[[ $name =~ ^[a-z][a-z0-9-]{0,37}$ ]] || fail "NAME='$name': Kubernetes wants small letters, digits and -, up to 38"
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

needed() { # the options of these names have to be there
  local option
  for option in "$@"; do
    [[ -n ${!option} ]] || fail "--$option is missing: $action needs $(printf -- '--%s ' "$@")"
  done
}

json() { # a string as JSON, which is YAML too
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  local argument arguments='"-m", "ivideo.main", "--distributed"'
  for argument in "${rest[@]}"; do arguments+=", $(json "$argument")"; done
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  # A host that leaves takes the others with it; all of them go on from the newest checkpoint
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - name: mistake
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
        # A mistake in the command, or too many updates that were not finite: again, it would only fail again
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: ivideo
              operator: In
              values: [1, 2]
        template:
          spec:
            restartPolicy: Never # podFailurePolicy asks for it
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $(json "$topology")
            containers:
            - name: ivideo
              image: $(json "$image")
              # exec of Python itself, so that it has the signal to stop
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
    for number in hosts chips restarts grace; do
      [[ ${!number} =~ ^[0-9]+$ ]] || fail "--$number=${!number}: expected a number"
    done
    if [[ $action == render ]]; then
      manifest
    elif [[ -n ${DRY_RUN:-} ]]; then
      manifest
      run kubectl apply -f -
    else
      manifest | kubectl apply -f -
    fi
    ;;
  xpk)
    needed image cluster zone type
    run xpk workload create "--workload=$name" "--cluster=$cluster" "--zone=$zone" "--tpu-type=$type" \
      "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=75,76,77 \
      "--command=exec python -m ivideo.main --distributed $(quoted "${rest[@]}")"
    ;;
  delete) run kubectl delete jobset "$name" ;;
esac
