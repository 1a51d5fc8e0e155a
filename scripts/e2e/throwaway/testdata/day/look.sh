# Looking at things: output formats, labels, describe, events, logs, exec, cp, ways in, documentation.
kubectl create deployment web --image="$IMAGE" -- probe serve :8080 seen
kubectl run talks --image="$IMAGE" --restart=Never --labels=role=talker --command -- sh -c 'for i in 1 2 3 4 5; do echo line $i; done; exec sleep 3600'
kubectl wait --for=condition=Ready pod/talks --timeout=90s
rolled deployment/web

has "NODE" kubectl get pods -o wide
has "kind: Pod" kubectl get pod talks -o yaml
has '"kind": "Pod"' kubectl get pod talks -o json
is talks kubectl get pod talks -o jsonpath='{.metadata.name}'
is "talks $IMAGE" sh -c "kubectl get pod talks --no-headers -o custom-columns=N:.metadata.name,I:.spec.containers[0].image | tr -s ' '"
is pod/talks kubectl get pods -l role=talker -o name
is Running kubectl get pod talks -o go-template='{{.status.phase}}'
has "talks" kubectl get pods --field-selector=status.phase=Running --sort-by=.metadata.creationTimestamp
has "ROLE" kubectl get pods -L role
has "kube-system" kubectl get namespaces
has "control-plane" kubectl get nodes
has "deployment.apps/web" kubectl get all

kubectl label pod talks mood=good
kubectl label pod talks mood=bad --overwrite
refused "already has a value" kubectl label pod talks mood=good
is bad kubectl get pod talks -o jsonpath='{.metadata.labels.mood}'
kubectl label pod talks mood-
kubectl annotate pod talks note="a b"
is "a b" kubectl get pod talks -o jsonpath='{.metadata.annotations.note}'
kubectl annotate pod talks note-

has "Started" kubectl describe pod talks
has "Allocatable" kubectl describe node server-1
has "Started" kubectl events --for pod/talks
has "Scheduled" kubectl get events --field-selector=involvedObject.name=talks
is "line 5" kubectl logs talks --tail=1
has "[pod/talks/talks] line 1" kubectl logs -l role=talker --prefix --tail=-1
is "hello" kubectl exec talks -- echo hello
is "sent" sh -c 'echo sent | kubectl exec -i talks -- cat'
refused "exit code 3" kubectl exec talks -- sh -c 'exit 3'

mkdir -p in/deep
echo copied >in/deep/file
kubectl cp in talks:/tmp-in
is copied kubectl exec talks -- cat /tmp-in/deep/file
kubectl cp talks:/tmp-in/deep/file out
is copied cat out

# background COMMAND...: prints to background.txt until the script ends.
background() {
	: >background.txt
	"$@" >background.txt 2>&1 &
	trap "kill $!" EXIT
	eventually grep -qE '127\.0\.0\.1:[0-9]+' background.txt
	address=$(grep -oE '127\.0\.0\.1:[0-9]+' background.txt | head -1)
}
background kubectl port-forward deployment/web :8080
eventually is seen probe get "http://$address"
kill $!
kubectl expose deployment web --port=80 --target-port=8080
background kubectl port-forward service/web :80
eventually is seen probe get "http://$address"
kill $!
background kubectl proxy --port=0
has '"gitVersion"' probe get "http://$address/version"
eventually is seen probe get "http://$address/api/v1/namespaces/$NS/services/web/proxy/"
kill $!
trap - EXIT
has seen kubectl get --raw "/api/v1/namespaces/$NS/services/web/proxy/"

has "replicas" kubectl explain deployment.spec
has "KIND:       Pod" kubectl explain pod.spec.containers --recursive
has "deployments" kubectl api-resources --api-group=apps
has "networking.k8s.io/v1" kubectl api-versions
has "is running at" kubectl cluster-info
has "Server Version" kubectl version
has yes kubectl auth can-i delete nodes
has "Username" kubectl auth whoami

kubectl debug talks --image="$IMAGE" --target=talks -c doctor -- sh -c 'echo the patient: $(hostname)'
eventually has "the patient: talks" kubectl logs talks -c doctor
kubectl debug talks --copy-to=twin --set-image="*=$IMAGE2" --share-processes
kubectl wait --for=condition=Ready pod/twin --timeout=90s
kubectl debug node/server-1 --image="$IMAGE" -- sh -c 'hostname; ls /host/var/lib/kedge'
debugger=$(kubectl get pods -o name | grep node-debugger)
eventually has containerd kubectl logs "$debugger"
