# For scripts in the first of several instances, 10.77.0.1: what is done in the other one, 10.77.0.2, and in more.
say() { read -r up _ </proc/uptime; echo "  [$up s] $*"; }
# in_node N PORT COMMAND: in an instance, whose shell listens there, at 7001 anew after each.
in_node() { until echo "cd /root; $3" | nc 10.77.0.$1 $2 2>/dev/null; do sleep 0.2; done; }
# A command in the other instance.
other() { in_node 2 7001 "$*"; }
other true
# What the other one says when something fails.
trap '[ $? = 0 ] || { echo "-- there"; other "tail -n 30 *.log; blanket ps"; }' EXIT

# put FILE [N]: the same file there, or in another instance.
put() { in_node ${2:-2} 7001 "base64 -d >$1 <<'E'
$(base64 $1)
E"; }

# bridged TAP: a bridge in each, with the link between them and a tap of that name.
bridged() {
    bridge="brctl addbr br0; brctl addif br0 eth0; tunctl -t $1 >/dev/null; brctl addif br0 $1
        ip link set $1 up; ip link set br0 up; ip addr flush dev eth0; ip addr add 10.77.0.NODE/24 dev br0"
    # The connection that this comes over breaks with the address.
    other "(sleep 0.2; ${bridge%NODE*}2${bridge#*NODE}) >/dev/null 2>&1 &"
    eval "${bridge%NODE*}1${bridge#*NODE}"
    until [ "$(other echo bridged)" = bridged ]; do sleep 0.2; done
}

# agent NAME, agent_there NAME [OPTIONS]: the agent of a node, in the background. Its log is in
# NAME.log, its pid in $agent, or there in the file agent.
agent() {
    SUPERCLOUD_LOG=info supercloud node start --name $1 --listen 10.77.0.1:7700 >>$1.log 2>&1 &
    agent=$!
}
agent_there() {
    other "SUPERCLOUD_LOG=info supercloud node start --name $1 --listen 10.77.0.2:7700 $2 >>$1.log 2>&1 & echo \$! >agent"
}
# two_nodes HERE THERE: the second one joins by a $token.
two_nodes() {
    agent $1
    until_true "no agent" 'supercloud node list >/dev/null 2>&1'
    token=$(supercloud node token) || fail "no token"
    agent_there $2 "--join '$token'"
    until_true "$2 does not come: $(other cat $2.log)" "supercloud node list | grep -q '^$2 .*reachable'"
}
