# Files: apply one and a folder, diff, edit, patch, replace, wait, delete with and without what belongs to it.
mkdir -p shop
cat >shop/page.yaml <<END
apiVersion: v1
kind: ConfigMap
metadata: {name: page, labels: {app: shop}}
data: {text: "open"}
END
cat >shop/web.yaml <<END
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, labels: {app: shop}}
spec:
  replicas: 1
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: box, image: $IMAGE, command: [sh, -c, "exec probe serve :8080 \"\$TEXT\""], env: [{name: TEXT, valueFrom: {configMapKeyRef: {name: page, key: text}}}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop, labels: {app: shop}}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: 8080}]}
END
has "configmap/page created (server dry run)" kubectl apply --dry-run=server -f shop/page.yaml
has "configmap/page created" kubectl apply -f shop/page.yaml
has "configmap/page unchanged" kubectl apply -f shop/
client
rolled deployment/shop
eventually is open kubectl exec client -- probe get http://shop

sed -i s/open/closed/ shop/page.yaml
refused "+  text: closed" kubectl diff -f shop/page.yaml
has "configmap/page configured" kubectl apply -f shop/page.yaml
is "" kubectl diff -f shop/page.yaml
KUBE_EDITOR="sed -i s/closed/edited/" kubectl edit configmap/page
is edited kubectl get configmap page -o jsonpath='{.data.text}'
kubectl patch configmap page --type=merge -p '{"data":{"more":"yes"}}'
kubectl patch configmap page --type=json -p '[{"op":"remove","path":"/data/text"}]'
is '{"more":"yes"}' kubectl get configmap page -o jsonpath='{.data}'
has replaced kubectl replace -f shop/page.yaml
has serverside-applied kubectl apply --server-side --force-conflicts -f shop/page.yaml
refused 'strict decoding error: unknown field "spec.replicaz"' sh -c 'sed "s/replicas:/replicaz:/" shop/web.yaml | kubectl apply -f -'

# kustomize is part of kubectl.
printf 'resources: [page.yaml, web.yaml]\nnamePrefix: second-\n' >shop/kustomization.yaml
has "deployment.apps/second-shop created" kubectl apply -k shop
kubectl wait --for=condition=Available deployment/second-shop --timeout=90s
kubectl wait --for=jsonpath='{.status.readyReplicas}'=1 deployment/second-shop --timeout=90s
kubectl delete -k shop --wait=false
rm shop/kustomization.yaml

# Orphans stay, the rest goes with its owner.
kubectl delete deployment shop --cascade=orphan
set_of_pods=$(kubectl get replicaset -l app=shop -o name)
[ -n "$set_of_pods" ] || fail "the ReplicaSet went with its orphaning owner"
kubectl delete "$set_of_pods" --cascade=foreground --timeout=90s
eventually is "" kubectl get pods -l app=shop -o name
kubectl apply -f shop/
rolled deployment/shop
kubectl delete deployment shop
eventually is "" kubectl get replicasets,pods -l app=shop -o name
kubectl delete -f shop/ --ignore-not-found
kubectl delete pod client --now --wait=false
kubectl create namespace "$NS-doomed"
kubectl create configmap a --from-literal=a=b -n "$NS-doomed"
kubectl delete namespace "$NS-doomed" --timeout=90s
refused NotFound kubectl get namespace "$NS-doomed"
