# shellcheck shell=bash disable=SC2034,SC2153  # shares variables with tpu.sh
# Sourced by tpu.sh: the slice in the cloud. A queued resource NAME, labelled insec-jax=NAME, with the node NAME, or with
# the nodes NAME-0, NAME-1, ... when it has several slices. Only what has the label is deleted.

# Sets KIND and ADVICE for an error text of gcloud. quota, permission, account and place end a launch (exit code 2);
# capacity, network and other may pass.
explain() {
  local text=$1
  [ -z "$NAME" ] || text=${1//"$NAME"/}  # a name may have a word such as quota
  case $text in
    *'attribute [project]'* | *'core/project'*)
      KIND=account
      ADVICE="name the project: --project=..., or gcloud config set project" ;;
    *'no more capacity'* | *'nsufficient reserved capacity'* | *'nsufficient capacity'* | *stockout* | *STOCKOUT*)
      KIND=capacity
      ADVICE="the zone $ZONE has no such slice free now; --keep-alive asks again, or try another --zone, a smaller --type or --spot" ;;
    *SERVICE_DISABLED* | *'has not been used in project'* | *'it is disabled'*)
      KIND=permission
      ADVICE="the Cloud TPU API is off in this project; gcloud services enable tpu.googleapis.com" ;;
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      KIND=quota
      ADVICE="ask for more at https://console.cloud.google.com/iam-admin/quotas (service tpu.googleapis.com, region of $ZONE; --spot counts as preemptible quota), or take a smaller --type; dead requests count too, see launch/tpu.sh list" ;;
    *'active account'* | *eauthentication* | *'refreshing your current auth'* | *UNAUTHENTICATED* | *invalid_grant*)
      KIND=account
      ADVICE="log in with gcloud auth login" ;;
    *PERMISSION_DENIED* | *'does not have permission'* | *'Permission '*' denied'* | *forbidden* | *Forbidden*)
      KIND=permission
      ADVICE="the account (gcloud config get account) needs the roles TPU Admin and Service Account User in the project" ;;
    *'ccelerator type'* | *'untime version'* | *'ocation '*'not found'* | *'Invalid value for [--zone]'* | *INVALID_ARGUMENT* | *'is not a valid'* | *'not supported'*)
      KIND=place
      ADVICE="see gcloud compute tpus accelerator-types list --zone=$ZONE, and versions list" ;;
    *ALREADY_EXISTS* | *'already exists'*) KIND=exists ADVICE="" ;;
    *NOT_FOUND* | *'not found'*) KIND=absent ADVICE="" ;;
    *resolve* | *'onnection'* | *UNAVAILABLE* | *'timed out'* | *'Network is unreachable'* | *DEADLINE_EXCEEDED*)
      KIND=network
      ADVICE="check the connection of this machine, and run the same command again" ;;
    *) KIND=other ADVICE="run the same command again; if it stays, see the message above" ;;
  esac
}

# Ends with one line for the error text of gcloud: exit code 2 if something is missing, else 1.
refuse() {
  local text
  explain "$2"
  text="$1: $(printf '%s' "$2" | tr '\n' ' ' | cut -c1-400); $ADVICE"
  case $KIND in quota | permission | account | place) fail "$text" ;; *) broken "$text" ;; esac
}

# Runs gcloud in the project; sets OUT, and ERR if it fails. A look that is repeated is shown once.
ask() {
  local command seconds=$ANSWER_SECONDS
  scratch
  command=$(quoted gcloud compute tpus "$@" ${PROJECT:+"--project=$PROJECT"} --zone="$ZONE" --quiet)
  case ${SHOWN:=|} in
    *"|$1 $2 $3|"*) ;;
    *)
      printf '+ %s\n' "$command" >&2
      case $2 in create | delete) ;; *) SHOWN="$SHOWN$1 $2 $3|" ;; esac ;;
  esac
  [ "$2" != create ] || seconds=$((seconds * 5))
  OUT='' ERR=''
  [ -z "$DRY_RUN" ] || return 0
  OUT=$(within "$seconds" gcloud compute tpus "$@" ${PROJECT:+"--project=$PROJECT"} --zone="$ZONE" --quiet \
    2> "$INSEC_SCRATCH/gcloud" < /dev/null) || {
    ERR=$(cat "$INSEC_SCRATCH/gcloud")
    ERR=${ERR:-gcloud gave no answer in $seconds s: the connection timed out}
    return 1
  }
}

# Whether the labels, as gcloud prints them, have insec-jax=NAME.
is_labelled() {
  case ";$1;" in *[!A-Za-z0-9_-]"insec-jax=$NAME"[!A-Za-z0-9_-]*) ;; *) return 1 ;; esac
}

# Sets STATE to that of the queued resource, to ABSENT, or to UNKNOWN with ERR; also OURS, MADE (its type), NUM_SLICES,
# REASON, and INITIATOR: whether USER or SERVICE suspended it.
look() {
  local spec='tpu.nodeSpec[0]' labels alpha
  STATE=UNKNOWN INITIATOR='' OURS='' MADE='' REASON=''
  if ! ask queued-resources describe "$NAME" --format="value[separator=\"|\"](state.state,state.stateInitiator,\
$spec.node.acceleratorType,$spec.multisliceParams.nodeCount,$spec.multiNodeParams.nodeCount,$spec.node.labels,state.failedData.error.message)"; then
    explain "$ERR"
    [ "$KIND" != absent ] || STATE=ABSENT
    return 0
  fi
  if [ -n "$DRY_RUN" ]; then
    STATE=ABSENT
    return 0
  fi
  IFS='|' read -r STATE INITIATOR MADE NUM_SLICES alpha labels REASON <<< "$OUT"
  NUM_SLICES=${NUM_SLICES:-${alpha:-1}}
  if is_labelled "$labels"; then OURS=yes; fi
}

# Ends unless the queued resource, which exists, was made by `create`.
check_ours() {
  [ -n "$OURS" ] || fail "the queued resource $NAME in $ZONE was not made by this program (it has no label" \
    "insec-jax=$NAME); give another --name, or delete it with gcloud"
}

# The ids of the nodes.
nodes() {
  local index
  if [ "${NUM_SLICES:-1}" -eq 1 ]; then
    echo "$NAME"
  else
    for ((index = 0; index < NUM_SLICES; index++)); do echo "$NAME-$index"; done
  fi
}

# Sets HOSTS, NODE/WORKER for each, and HEALTH: ready; gone if a node was preempted, stopped or deleted; unsure if the
# cloud does not answer, or a node is being repaired.
look_at_nodes() {
  local node state addresses labels count
  HOSTS=() HEALTH=ready
  for node in $(nodes); do
    if ! ask tpu-vm describe "$node" --format="value[separator=\"|\"](state,networkEndpoints[].ipAddress,labels)"; then
      explain "$ERR"
      if [ "$KIND" = absent ]; then HEALTH=gone REASON="$node is gone"; else HEALTH=unsure REASON=$ERR; fi
      return 0
    fi
    if [ -n "$DRY_RUN" ]; then
      HOSTS[${#HOSTS[@]}]=$node/0
      continue
    fi
    IFS='|' read -r state addresses labels <<< "$OUT"
    case $state in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) HEALTH=gone; REASON="$node is $state"; return 0 ;;
      *) HEALTH=unsure REASON="$node is $state" ;;
    esac
    count=0
    while [ -n "$addresses" ]; do
      HOSTS[${#HOSTS[@]}]=$node/$count
      count=$((count + 1))
      case $addresses in *[\;,]*) addresses=${addresses#*[;,]} ;; *) addresses='' ;; esac
    done
    [ "$count" -gt 0 ] || HEALTH=unsure REASON="$node has no addresses yet"
  done
}

# Sends the request. Returns 1 with ERR if the cloud refuses it.
request() {
  local words=(--accelerator-type="$TYPE" --runtime-version="$VERSION" --labels="insec-jax=$NAME")
  [ -z "$SPOT" ] || words[${#words[@]}]=--spot
  if [ "$SLICES" -eq 1 ]; then
    words[${#words[@]}]=--node-id=$NAME
  else
    words[${#words[@]}]=--node-count=$SLICES
    words[${#words[@]}]=--node-prefix=$NAME
  fi
  # The cloud drops it then by itself: a slice that nobody waits for any more would cost money.
  ask queued-resources create "$NAME" "${words[@]}" --valid-until-duration="$1s" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} ||
    { explain "$ERR"; [ "$KIND" = exists ]; }
}

# Deletes the queued resource and its nodes, if it has the label, and waits until they are gone; `look` has been called.
# A dead one is deleted without --force, which spares one of the same name that was granted meanwhile.
remove() {
  local tries=0 asked='' force stuck=''
  while [ "$STATE" != ABSENT ]; do
    tries=$((tries + 1))
    [ "$tries" -le 40 ] || refuse "the queued resource $NAME is not deleted (state $STATE) and may cost money" "$ERR"
    if [ "$STATE" != UNKNOWN ] && [ "$STATE" != DELETING ]; then
      [ -n "$OURS" ] || [ -z "$asked" ] || break  # somebody else's by now
      check_ours
      case $STATE in SUSPENDED | FAILED) force=$stuck ;; *) force=--force ;; esac
      if ! ask queued-resources delete "$NAME" --async ${force:+"$force"}; then
        echo "not deleted yet: $ERR" >&2
        case $ERR in *FAILED_PRECONDITION*) stuck=--force ;; esac  # the dead one still has nodes
      fi
      [ -z "$DRY_RUN" ] || break
      asked=yes
    fi
    look
    [ "$STATE" = ABSENT ] || nap "$POLL_SECONDS"
  done
  REQUESTED=''
  remove_nodes
}

# Deletes the nodes with the label that are left without their queued resource.
remove_nodes() {
  local tries=0 name left labels
  while :; do
    ask tpu-vm list --format="value[separator=\"|\"](name.basename(),state,acceleratorType,labels)" ||
      refuse "whether nodes of $NAME are left is not known, and they would cost money" "$ERR"
    left=''
    while IFS='|' read -r name _ _ labels; do
      if is_labelled "$labels"; then left="$left $name"; fi
    done <<< "$OUT"
    [ -n "$left" ] || break
    tries=$((tries + 1))
    [ "$tries" -le 20 ] || broken "not deleted, and may cost money:$left; run the same command again"
    for name in $left; do
      ask tpu-vm delete "$name" || echo "not deleted yet: $ERR" >&2
    done
    nap "$POLL_SECONDS"
  done
}

# Makes sure that the request is there and waits for the slice, for so many seconds. Returns 0 when it is active, 1 when
# it is not (REASON; nothing is left in the queue). One line for each change of state.
obtain() {
  local seconds=$1 until=$(($(date +%s) + $1)) seen='' tries=0 reason was
  while :; do
    look
    [ "$STATE" = ABSENT ] || [ "$STATE" = UNKNOWN ] || check_ours
    [ -z "$MADE" ] || [ "$MADE" = "$TYPE" ] || fail "$NAME is a $MADE, not a $TYPE; delete it first, or give another --name"
    if [ "$STATE" != "$seen" ]; then
      echo "$(date +%H:%M:%S) the slice $NAME is $STATE" >&2
      seen=$STATE
    fi
    case $STATE in
      ACTIVE) return 0 ;;
      ABSENT)
        REQUESTED=yes
        if ! request "$seconds"; then
          # Whether it arrived is not known after a broken connection: the next look shows it.
          tries=$((tries + 1))
          [ "$KIND" = network ] && [ "$tries" -lt 20 ] || { REQUESTED=''; return 1; }
        fi
        [ -z "$DRY_RUN" ] || return 0 ;;
      SUSPENDED | FAILED)
        reason=${REASON:-the cloud gave no reason} was=$STATE$REQUESTED
        remove
        if [ "$was" = FAILEDyes ]; then
          ERR=$reason
          return 1
        fi
        seconds=$((until - $(date +%s))) ;;
      UNKNOWN)
        explain "$ERR"
        tries=$((tries + 1))
        case $KIND in network | other) [ "$tries" -lt 20 ] || return 1 ;; *) return 1 ;; esac ;;
    esac
    if [ "$(date +%s)" -ge "$until" ]; then
      [ "$STATE" = UNKNOWN ] || remove
      ERR="it was not granted in time: there is no more capacity"
      return 1
    fi
    [ "$STATE" = ABSENT ] || nap "$POLL_SECONDS"
  done
}
