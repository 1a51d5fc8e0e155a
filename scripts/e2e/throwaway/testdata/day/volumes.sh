# A PersistentVolume by hand, claimed, written by one pod and read by the next.
kubectl apply -f - <<END
apiVersion: v1
kind: PersistentVolume
metadata: {name: $NS-disk}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: by-hand-$NS
  persistentVolumeReclaimPolicy: Retain
  local: {path: /opt}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [agent-1]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim}
spec: {accessModes: [ReadWriteOnce], storageClassName: by-hand-$NS, resources: {requests: {storage: 500Mi}}}
END
kubectl wait --for=jsonpath='{.status.phase}'=Bound pvc/claim --timeout=90s
pod() {
	kubectl apply -f - <<END
apiVersion: v1
kind: Pod
metadata: {name: $1}
spec:
  restartPolicy: Never
  containers: [{name: box, image: $IMAGE, command: [sh, -c, "$2"], volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, persistentVolumeClaim: {claimName: claim}}]
END
	kubectl wait --for=jsonpath='{.status.phase}'=Succeeded "pod/$1" --timeout=90s
}
pod writes "echo kept > /v/$NS"
is agent-1 kubectl get pod writes -o jsonpath='{.spec.nodeName}'
kubectl delete pod writes
pod reads "cat /v/$NS"
is kept kubectl logs reads
kubectl delete pod reads
kubectl delete pvc claim
eventually is Released kubectl get pv "$NS-disk" -o jsonpath='{.status.phase}'
kubectl patch pv "$NS-disk" --type=json -p '[{"op":"remove","path":"/spec/claimRef"}]'
eventually is Available kubectl get pv "$NS-disk" -o jsonpath='{.status.phase}'
kubectl delete pv "$NS-disk"
