# A CronJob fires by itself and by hand.
kubectl create cronjob tick --image="$IMAGE" --schedule="* * * * *" -- echo tock
kubectl create job by-hand --from=cronjob/tick
kubectl wait --for=condition=Complete job/by-hand --timeout=90s
is tock kubectl logs job/by-hand
eventually has tick- kubectl get jobs -o name
job=$(kubectl get jobs -o name | grep tick- | head -1)
kubectl wait --for=condition=Complete "$job" --timeout=90s
is tock kubectl logs "$job"
has true kubectl patch cronjob tick -p '{"spec":{"suspend":true}}' -o jsonpath='{.spec.suspend}'
