# What nodes and pods use.
kubectl run busy --image="$IMAGE" --restart=Never --command -- probe spin 3600
kubectl wait --for=condition=Ready pod/busy --timeout=90s
eventually has server-1 kubectl top nodes
eventually has busy kubectl top pods
eventually has busy kubectl top pods --containers
