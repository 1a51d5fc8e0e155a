# ConfigMaps and Secrets: four ways of making them, and every way of using them.
printf 'A=1\nB=2\n' >settings.env
echo "one file" >one.txt
mkdir -p many
echo "of many" >many/first
echo "the rest" >many/second
for kind in configmap "secret generic"; do
	name=$(echo "$kind" | cut -c1)
	kubectl create $kind $name-literal --from-literal=KEY=value --from-literal=OTHER="two words"
	kubectl create $kind $name-file --from-file=one.txt --from-file=renamed=one.txt
	kubectl create $kind $name-folder --from-file=many
	kubectl create $kind $name-env --from-env-file=settings.env
done
is '{"A":"1","B":"2"}' kubectl get configmap c-env -o jsonpath='{.data}'
is "two words" sh -c "kubectl get secret s-literal -o jsonpath='{.data.OTHER}' | base64 -d"
has "first" kubectl describe configmap c-folder
has "9 bytes" kubectl describe secret s-file
kubectl create secret docker-registry pull --docker-server=example.org --docker-username=u --docker-password=p
is kubernetes.io/dockerconfigjson kubectl get secret pull -o jsonpath='{.type}'

kubectl apply -f - <<END
apiVersion: v1
kind: Pod
metadata: {name: user, labels: {app: user}, annotations: {note: noted}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: box
    image: $IMAGE
    command: [sh, -c, 'echo "args \$(FROM_MAP)"; env | sort; exec sleep 3600']
    env:
    - {name: FROM_MAP, valueFrom: {configMapKeyRef: {name: c-literal, key: KEY}}}
    - {name: FROM_SECRET, valueFrom: {secretKeyRef: {name: s-literal, key: OTHER}}}
    - {name: MAYBE, valueFrom: {configMapKeyRef: {name: none, key: none, optional: true}}}
    - {name: MY_NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    envFrom: [{configMapRef: {name: c-env}}, {prefix: S_, secretRef: {name: s-env}}]
    volumeMounts:
    - {name: map, mountPath: /map}
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: one, mountPath: /etc/one.txt, subPath: one.txt}
    - {name: all, mountPath: /all}
  volumes:
  - {name: map, configMap: {name: c-folder}}
  - {name: secret, secret: {secretName: s-folder, defaultMode: 0400, items: [{key: second, path: deep/second}]}}
  - {name: one, configMap: {name: c-file}}
  - name: all
    projected:
      sources:
      - {configMap: {name: c-literal}}
      - {secret: {name: s-file}}
      - {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
END
kubectl wait --for=condition=Ready pod/user --timeout=90s
for line in "args value" "FROM_MAP=value" "FROM_SECRET=two words" "A=1" "S_B=2" "MY_NODE="; do has "$line" kubectl logs user; done
is "of many" kubectl exec user -- cat /map/first
is "the rest" kubectl exec user -- cat /secret/deep/second
is "one file" kubectl exec user -- cat /etc/one.txt
is "value" kubectl exec user -- cat /all/KEY
is "one file" kubectl exec user -- cat /all/renamed
has 'app="user"' kubectl exec user -- cat /all/labels

# A change arrives in the volume; an immutable map does not change. (The pod's annotation makes the kubelet look now.)
kubectl create configmap c-folder --from-literal=first="changed" --dry-run=client -o yaml | kubectl replace -f -
kubectl annotate pod user note=again --overwrite
eventually is changed kubectl exec user -- cat /map/first
kubectl patch configmap c-env -p '{"immutable":true}'
refused "immutable" kubectl patch configmap c-env -p '{"data":{"A":"2"}}'
