# A node comes and the DaemonSet follows it; it loses power and its pods move.
kubectl apply -f - <<END
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers: [{name: box, image: $IMAGE, command: [sleep, "3600"]}]
END
rolled daemonset/everywhere
is 3 kubectl get daemonset everywhere -o jsonpath='{.status.numberReady}'
is agent-3 kedge node add --name day
eventually is 4 kubectl get daemonset everywhere -o jsonpath='{.status.numberReady}'

kubectl label node agent-3 "$NS=home"
kubectl apply -f - <<END
apiVersion: apps/v1
kind: Deployment
metadata: {name: moves}
spec:
  replicas: 1
  selector: {matchLabels: {app: moves}}
  template:
    metadata: {labels: {app: moves}}
    spec:
      affinity:
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: $NS, operator: Exists}]}}]
      tolerations:
      - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      containers: [{name: box, image: $IMAGE, command: [probe, serve, ":8080", moved]}]
END
rolled deployment/moves
is agent-3 kubectl get pods -l app=moves -o jsonpath='{.items[0].spec.nodeName}'
kubectl expose deployment moves --port=80 --target-port=8080
kedge node stop --name day agent-3
eventually has NotReady kubectl get node agent-3
# elsewhere: the pod that is not leaving is on another node.
elsewhere() {
	kubectl get pods -l app=moves -o jsonpath='{range .items[*]}{.spec.nodeName} {.status.phase} {.metadata.deletionTimestamp}{"\n"}{end}' | grep -v agent-3 | grep -q Running
}
eventually elsewhere
client
eventually is moved kubectl exec client -- probe get http://moves
kedge node start --name day agent-3
eventually is True kubectl get node agent-3 -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}'
# What was left there of the pod goes.
eventually is 1 sh -c "kubectl get pods -l app=moves -o name | wc -l"
kedge node rm --name day agent-3
eventually is 3 kubectl get daemonset everywhere -o jsonpath='{.status.desiredNumberScheduled}'
