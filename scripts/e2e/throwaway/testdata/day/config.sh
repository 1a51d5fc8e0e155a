# A kubeconfig with more than one context.
has kedge-day kubectl config get-contexts
kubectl config set-context elsewhere --cluster=kedge-day --user=kedge-day --namespace=kube-system
kubectl config use-context elsewhere
is elsewhere kubectl config current-context
has 'namespace: kube-system' kubectl config view --minify
is default kubectl --context=kedge-day get serviceaccount default -n default -o jsonpath='{.metadata.name}'
kubectl config set-context --current --namespace="$NS"
has "serviceaccount/default" kubectl get serviceaccounts -o name
kubectl config rename-context elsewhere here
kubectl config use-context kedge-day
kubectl config delete-context here
refused "no context exists" kubectl config use-context here

# Somebody with less to say: a service account's token in a context of its own.
kubectl create serviceaccount reader
kubectl create role reads --verb=get,list --resource=pods
kubectl create rolebinding reader-reads --role=reads --serviceaccount="$NS:reader"
kubectl config set-credentials reader --token="$(kubectl create token reader)"
kubectl config set-context reader --cluster=kedge-day --user=reader --namespace="$NS"
is "No resources found in $NS namespace." kubectl --context=reader get pods
refused Forbidden kubectl --context=reader get secrets
is no sh -c 'kubectl --context=reader auth can-i delete pods || true'
is yes kubectl auth can-i list pods --as="system:serviceaccount:$NS:reader"
