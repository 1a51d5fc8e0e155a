# Where pods go: spread, pinned, repelled, evicted, pre-empted, drained. agent-1 and agent-2 are this script's.
# pod NAME NODE PRIORITY CPU [TOLERATIONS]
pod() {
	kubectl apply -f - <<END
apiVersion: v1
kind: Pod
metadata: {name: $1}
spec:
  nodeSelector: {kubernetes.io/hostname: $2}
  priorityClassName: $3
  terminationGracePeriodSeconds: 1
  tolerations: [${5:-}]
  containers: [{name: box, image: $IMAGE, command: [sleep, "3600"], resources: {requests: {cpu: $4}}}]
END
}
kubectl create priorityclass "$NS-low" --value=10
kubectl create priorityclass "$NS-high" --value=1000
kubectl apply -f - <<END
apiVersion: apps/v1
kind: Deployment
metadata: {name: spread}
spec:
  replicas: 2
  selector: {matchLabels: {app: spread}}
  template:
    metadata: {labels: {app: spread}}
    spec:
      terminationGracePeriodSeconds: 1
      affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [agent-1, agent-2]}]}]}}}
      topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: spread}}}]
      containers: [{name: box, image: $IMAGE, command: [sleep, "3600"]}]
END
rolled deployment/spread
is "agent-1 agent-2 " sh -c "kubectl get pods -l app=spread -o jsonpath='{range .items[*]}{.spec.nodeName}{\"\n\"}{end}' | sort | tr '\n' ' '"

pod pinned agent-1 "$NS-low" 10m
kubectl wait --for=condition=Ready pod/pinned --timeout=90s
is agent-1 kubectl get pod pinned -o jsonpath='{.spec.nodeName}'
kubectl taint node agent-1 "$NS=x:NoSchedule"
pod repelled agent-1 "$NS-low" 10m
pod tolerant agent-1 "$NS-low" 10m "{key: $NS, operator: Exists}"
kubectl wait --for=condition=Ready pod/tolerant --timeout=90s
eventually has "untolerated taint" kubectl get pod repelled -o jsonpath='{.status.conditions[?(@.type=="PodScheduled")].message}'
kubectl taint node agent-1 "$NS=x:NoExecute"
eventually refused NotFound kubectl get pod pinned
kubectl wait --for=condition=Ready pod/tolerant --timeout=90s
kubectl taint node agent-1 "$NS-"
# A kubelet may see the pod before it sees that the taint is gone, and then refuses it for
# good, as upstream's do: whatever owns a pod makes another.
welcome() {
	if [ "$(kubectl get pod repelled -o jsonpath='{.status.reason}')" = TaintToleration ]; then
		kubectl delete pod repelled
		pod repelled agent-1 "$NS-low" 10m
	fi
	kubectl wait --for=condition=Ready pod/repelled --timeout=10s
}
eventually welcome

# More than half of the node, twice: the second only fits in place of the first.
cpus=$(kubectl get node agent-2 -o jsonpath='{.status.allocatable.cpu}')
case $cpus in
*m) half=$((${cpus%m} * 6 / 10))m ;;
*) half=$((cpus * 600))m ;;
esac
pod modest agent-2 "$NS-low" "$half"
kubectl wait --for=condition=Ready pod/modest --timeout=90s
pod important agent-2 "$NS-high" "$half"
kubectl wait --for=condition=Ready pod/important --timeout=90s
eventually refused NotFound kubectl get pod modest
has Preempted kubectl events

kubectl cordon agent-2
has SchedulingDisabled kubectl get node agent-2
pod late agent-2 "$NS-low" 1m
eventually has unschedulable kubectl get pod late -o jsonpath='{.status.conditions[?(@.type=="PodScheduled")].message}'
kubectl scale deployment/spread --replicas=1
kubectl create poddisruptionbudget spread --selector=app=spread --max-unavailable=1
kubectl drain agent-2 --ignore-daemonsets --delete-emptydir-data --force --grace-period=1 --timeout=90s --pod-selector="app!=client"
is "" kubectl get pods --field-selector=spec.nodeName=agent-2,status.phase=Running -o name
rolled deployment/spread
kubectl uncordon agent-2
kubectl wait --for=condition=Ready pod/late --timeout=90s
