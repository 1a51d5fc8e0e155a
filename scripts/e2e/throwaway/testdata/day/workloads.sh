# Deployments and pods by commands alone: create, run, expose, set, scale, roll out, autoscale.
kubectl create deployment web --image="$IMAGE" --replicas=2 -- probe serve :8080 first
client
rolled deployment/web

kubectl expose deployment web --port=80 --target-port=8080
kubectl expose deployment web --name=web-node --type=NodePort --port=80 --target-port=8080
kubectl expose deployment web --name=web-lb --type=LoadBalancer --port=8081 --target-port=8080
eventually is first kubectl exec client -- probe get http://web
port=$(kubectl get service web-node -o jsonpath='{.spec.ports[0].nodePort}')
eventually is first probe get "http://$SERVER:$port"
eventually has . kubectl get service web-lb -o jsonpath='{.status.loadBalancer.ingress[0].ip}'
address=$(kubectl get service web-lb -o jsonpath='{.status.loadBalancer.ingress[0].ip}')
eventually is first probe get "http://$address:8081"

kubectl annotate deployment/web kubernetes.io/change-cause="the first"
kubectl set image deployment/web box="$IMAGE2"
kubectl annotate deployment/web kubernetes.io/change-cause="another image"
rolled deployment/web
is "$IMAGE2" kubectl get deployment web -o jsonpath='{.spec.template.spec.containers[0].image}'
kubectl set env deployment/web COLOUR=green
kubectl set resources deployment/web --requests=cpu=1m
rolled deployment/web
has "another image" kubectl rollout history deployment/web
has "COLOUR" kubectl rollout history deployment/web --revision=3

# An image that is nowhere: the old pods go on, and the change is taken back.
kubectl set image deployment/web box=example.org/is-nowhere:1
refused "timed out" kubectl rollout status deployment/web --timeout=3s
eventually is first kubectl exec client -- probe get http://web
kubectl rollout undo deployment/web
rolled deployment/web
kubectl rollout undo deployment/web --to-revision=1
rolled deployment/web
is "$IMAGE" kubectl get deployment web -o jsonpath='{.spec.template.spec.containers[0].image}'
kubectl rollout pause deployment/web
kubectl set env deployment/web COLOUR=red
has "true" kubectl get deployment web -o jsonpath='{.spec.paused}'
kubectl rollout resume deployment/web
kubectl rollout restart deployment/web
rolled deployment/web

kubectl scale deployment/web --replicas=4
rolled deployment/web
is 4 kubectl get deployment web -o jsonpath='{.status.readyReplicas}'
refused "Expected replicas" kubectl scale deployment/web --current-replicas=9 --replicas=1
kubectl scale deployment/web --replicas=1
eventually is 1 kubectl get deployment web -o jsonpath='{.status.replicas}'
kubectl autoscale deployment web --min=1 --max=3 --cpu=80%
has "Deployment/web" kubectl get hpa web
kubectl create job pi --image="$IMAGE" -- echo 3.14
kubectl wait --for=condition=Complete job/pi --timeout=90s
is 3.14 kubectl logs job/pi
kubectl run once --image="$IMAGE" --restart=Never --rm --attach -- echo hello >once.txt
grep -q hello once.txt || fail "kubectl run --attach printed $(cat once.txt)"
