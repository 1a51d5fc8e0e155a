# Names and ways in: node port 31000 from outside, ExternalName, names of a StatefulSet's pods.
client
kubectl apply -f - <<END
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: NodePort, selector: {app: db}, ports: [{port: 80, targetPort: 8080, nodePort: 31000}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias}
spec: {type: ExternalName, externalName: db-1.db.$NS.svc.cluster.local}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: box, image: $IMAGE, command: [sh, -c, "exec probe serve :8080 \$(hostname)"]}]
END
rolled statefulset/db
eventually is db-0 kubectl exec client -- probe get http://db-0.db:8080
eventually is db-1 kubectl exec client -- probe get "http://db-1.db.$NS.svc.cluster.local:8080"
eventually is db-1 kubectl exec client -- probe get http://alias:8080
for address in $(kubectl get nodes -o jsonpath='{.items[*].status.addresses[?(@.type=="InternalIP")].address}'); do
	eventually has db- probe get "http://$address:31000"
	# From a pod as well, wherever it, the node and the endpoint are.
	for _ in 1 2 3 4 5 6; do has db- kubectl exec client -- probe get "http://$address:31000"; done
done
before=$(kubectl get pod db-1 -o jsonpath='{.metadata.uid}')
kubectl delete pod db-1
rolled statefulset/db
[ "$(kubectl get pod db-1 -o jsonpath='{.metadata.uid}')" != "$before" ] || fail "db-1 is the same pod"
eventually is db-1 kubectl exec client -- probe get http://db-1.db:8080
kubectl scale statefulset/db --replicas=1
eventually refused NotFound kubectl get pod db-1
