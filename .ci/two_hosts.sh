#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a pair of virtual network cards, torchrun in each.
# They train, are stopped and go on, lose their link in mid-run and go on: each time to the same weights.
# Needs root and iproute2; says why and succeeds where it cannot run.  Usage: .ci/two_hosts.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
peer_timeout=15   # seconds, in the place of common.PEER_TIMEOUT
margin=45         # seconds that torchrun may take besides

skip() { echo "two hosts: skipped, $1"; exit 0; }
fail() { echo "two hosts: FAILED, $1"; tail -n 15 "$work"/*.log; exit 1; }
command -v ip > /dev/null || skip "there is no command ip (package iproute2)"
hosts=("host0-$$" "host1-$$")
ip netns add "${hosts[0]}" 2> /dev/null || skip "no network namespace may be made here"
work=$(mktemp -d)
pids=()
tidy() {
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2> /dev/null | xargs -r kill -KILL || true   # torchrun's workers: only ours live there
    ip netns del "$host" 2> /dev/null || true
  done
  rm -rf "$work"
}
trap tidy EXIT
ip netns add "${hosts[1]}"
ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}" 2> /dev/null ||
  skip "no virtual network card may be made here"
for i in 0 1; do
  ip -n "${hosts[$i]}" addr add "10.77.0.$((i + 1))/24" dev eth0
  ip -n "${hosts[$i]}" link set eth0 up
  ip -n "${hosts[$i]}" link set lo up
done

"$python" - "$work" <<'PY'
import json, random, sys
draw = random.Random(0)
with open(f"{sys.argv[1]}/text.jsonl", "w") as file:
    for _ in range(400):
        file.write(json.dumps({"text": " ".join(draw.choices("cat dog sun sea tree".split(), k=20))}) + "\n")
PY
"$python" data/prepare_text.py "DATA=$work/text.jsonl" "OUT=$work/tokens" VOCAB_SIZE=300 > "$work/prepare.log" 2>&1
cat > "$work/short.py" <<PY
import runpy, sys
sys.path.insert(0, "$PWD")
import common
common.PEER_TIMEOUT = $peer_timeout
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
PY
words="DATA=$work/tokens DIM=32 N_LAYERS=2 N_HEADS=4 SEQ_LEN=64 STEPS=300 BATCH=8 MICRO_BATCH=4
  WARMUP=2 DTYPE=float32 LOG_EVERY=1 EVAL_EVERY=100 EVAL_ROWS=4 SAVE_EVERY=20 SAMPLE_EVERY=0 COMPILE=no"

begin() {  # OUT: the same command on both hosts
  pids=()
  for i in 0 1; do
    ip netns exec "${hosts[$i]}" setsid env GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 "$python" -m torch.distributed.run \
      --nnodes 2 --node_rank $i --master_addr 10.77.0.1 --master_port 29500 --nproc_per_node 1 \
      "$work/short.py" train_pretrain.py $words "OUT=$1" >> "$1.host$i.log" 2>&1 &
    pids+=($!)
  done
}
both_end_well() { wait "${pids[0]}" && wait "${pids[1]}" || fail "a run that should end well did not"; }
reached() {  # OUT step: wait until the metrics have it
  for _ in $(seq 600); do
    grep -qs "\"step\": $2," "$1/metrics.jsonl" && return
    kill -0 "${pids[0]}" 2> /dev/null || fail "the run ended before step $2"
    sleep 0.1
  done
  fail "step $2 was not reached in a minute"
}
same() {  # OUT: as uninterrupted, to the bit
  cmp "$work/whole/model.safetensors" "$1/model.safetensors" && cmp "$work/whole/metrics.jsonl" "$1/metrics.jsonl" ||
    fail "$1 is not the uninterrupted run"
}

begin "$work/whole"; both_end_well
ls "$work/whole/checkpoint.pt" > /dev/null
grep -q "done:" "$work/whole.host0.log" || fail "host 0 does not say done"
! grep -q "done:\|going on" "$work/whole.host1.log" || fail "host 1 saved too"
echo "two hosts: trained, saved by one"

begin "$work/stopped"; reached "$work/stopped" 40
kill -TERM "${pids[0]}"
wait "${pids[0]}" || true; wait "${pids[1]}" || true
grep -q "rerun the same command to go on" "$work/stopped.host0.log" || fail "host 0 was stopped and did not save"
begin "$work/stopped"; both_end_well
grep -q "going on from step" "$work/stopped.host0.log" || fail "it did not go on"
same "$work/stopped"
echo "two hosts: stopped on one host, went on, same weights to the bit"

begin "$work/cut"; reached "$work/cut" 60
ip -n "${hosts[0]}" link set eth0 down
began=$SECONDS
! wait "${pids[0]}" || fail "host 0 ended well without its link"
! wait "${pids[1]}" || fail "host 1 ended well without its link"
took=$((SECONDS - began))
[ "$took" -le $((peer_timeout + margin)) ] || fail "without the link it took $took s to end"
grep -q "did not answer for $peer_timeout s" "$work"/cut.host*.log || fail "no host says why it ended"
echo "two hosts: link down, both ended with an error after $took s (timeout $peer_timeout s):"
grep -h -o "error: train_pretrain.py.*" "$work"/cut.host*.log | cut -c1-220
ip -n "${hosts[0]}" link set eth0 up
begin "$work/cut"; both_end_well
same "$work/cut"
echo "two hosts: link up, went on, same weights to the bit"
