package workloads

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// configured are the objects that the tests of this file read.
const configured = `
{apiVersion: v1, kind: ConfigMap, metadata: {name: conf}, data: {colour: red, size: big, file.txt: from-conf}}
---
{apiVersion: v1, kind: Secret, metadata: {name: hidden}, stringData: {password: pa55}}
`

func TestEnvironmentVariables(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, configured)
	n.Apply(t, ns, harness.ShellWith("vars", "env", "", `
		envFrom: [{configMapRef: {name: conf}}, {secretRef: {name: hidden}, prefix: S_}, {configMapRef: {name: absent, optional: true}}],
		env: [{name: PLAIN, value: text}, {name: BUILT, value: "<$(PLAIN)> $$(PLAIN) $(NOTHING)"}, {name: size, value: small},
			{name: ONE, valueFrom: {configMapKeyRef: {name: conf, key: colour}}}, {name: TWO, valueFrom: {secretKeyRef: {name: hidden, key: password}}},
			{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}, {name: NS, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}},
			{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}, {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}},
			{name: SA, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}, {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}},
			{name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}, {name: MEM, valueFrom: {resourceFieldRef: {resource: requests.memory, divisor: 1Mi}}}],
		resources: {limits: {cpu: 300m}, requests: {cpu: 10m, memory: 20Mi}},`))
	lines := strings.Split(strings.TrimSpace(n.Output(t, ns, "vars")), "\n")
	pod, err := n.Pod(ns, "vars")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, l := range lines {
		name, value, _ := strings.Cut(l, "=")
		got[name] = value
	}
	for name, want := range map[string]string{
		"colour": "red", "size": "small", "S_password": "pa55", "PLAIN": "text", "BUILT": "<text> $(PLAIN) $(NOTHING)", "ONE": "red", "TWO": "pa55",
		"NODE": n.Name, "NS": ns, "IP": pod.Status.PodIP, "HOST": n.Address(t), "SA": "default", "APP": "vars", "CPU": "300", "MEM": "20",
		"KUBERNETES_SERVICE_HOST": "10.43.0.1", "KUBERNETES_SERVICE_PORT_HTTPS": "443",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

// TestConfigurationVolumesAreLive changes what volumes are made of while a container reads them.
func TestConfigurationVolumesAreLive(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, configured)
	n.Apply(t, ns, harness.ShellWith("reader", "exec sleep 3600", `
		volumes: [{name: c, configMap: {name: conf, defaultMode: 0440}}, {name: s, secret: {secretName: hidden, items: [{key: password, path: deep/pw, mode: 0400}]}},
			{name: d, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: annotations, fieldRef: {fieldPath: metadata.annotations}}, {path: cpu, resourceFieldRef: {containerName: main, resource: limits.cpu, divisor: 1m}}]}},
			{name: p, projected: {sources: [{configMap: {name: conf, items: [{key: colour, path: colour}]}}, {secret: {name: hidden}}, {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}]}}],`,
		`resources: {limits: {cpu: 200m}}, volumeMounts: [{name: c, mountPath: /c}, {name: s, mountPath: /s}, {name: d, mountPath: /d}, {name: p, mountPath: /p}, {name: c, mountPath: /one, subPath: file.txt}],`))
	n.WaitPod(t, ns, "reader", false)
	read := func(script string) string {
		return strings.Join(strings.Fields(n.Kubectl(t, "exec", "-n", ns, "reader", "--", "sh", "-c", script)), " ")
	}
	for script, want := range map[string]string{
		"cat /c/colour; echo; stat -L -c %a /c/colour":   "red 440",
		"cat /s/deep/pw; echo; stat -L -c %a /s/deep/pw": "pa55 400",
		"ls /s":                           "deep",
		"cat /d/labels; echo; cat /d/cpu": `app="reader" 200`,
		"cd /p; for f in *; do echo $f $(cat $f); done": "colour red name reader password pa55",
		"cat /one": "from-conf",
		"echo x 2>/dev/null >/c/colour || echo refused": "refused",
		"awk '$2 == \"/s\" {print $3}' /proc/mounts":    "tmpfs", // never on disk
	} {
		if got := read(script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	n.Kubectl(t, "patch", "configmap", "-n", ns, "conf", "-p", `{"data":{"colour":"blue","file.txt":"changed"}}`)
	n.Kubectl(t, "patch", "secret", "-n", ns, "hidden", "-p", `{"stringData":{"password":"changed"}}`)
	// A change of the pod makes the kubelet look at it now rather than within a minute.
	n.Kubectl(t, "annotate", "pod", "-n", ns, "reader", "look=now")
	harness.Eventually(t, 100*time.Second, func() error {
		if got := read("cat /c/colour /s/deep/pw /p/colour /p/password; grep -c look /d/annotations"); got != "bluechangedbluechanged1" {
			return fmt.Errorf("volumes have %q", got)
		}
		return nil
	})
	if got := read("cat /one"); got != "from-conf" {
		t.Errorf("a subPath is not updated, but is %q", got)
	}
}

// TestTokenAuthenticates asks the API from inside a pod who it is.
func TestTokenAuthenticates(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: ServiceAccount, metadata: {name: robot}}`)
	const review = `{"kind":"SelfSubjectReview","apiVersion":"authentication.k8s.io/v1"}`
	dir := "/var/run/secrets/kubernetes.io/serviceaccount/"
	api := fmt.Sprintf("https://%s:%d", n.Address(t), n.APIPort)
	ask := func(token string) string {
		return fmt.Sprintf(`probe post %s/apis/authentication.k8s.io/v1/selfsubjectreviews '%s' "Authorization:Bearer $(cat %s)" %sca.crt`, api, review, token, dir)
	}
	var answer struct {
		Status struct {
			UserInfo struct {
				Username string
				Groups   []string
				Extra    map[string][]string
			}
		}
	}
	out := n.RunPod(t, ns, "asks", ask(dir+"token"), "serviceAccountName: robot,")
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	user := answer.Status.UserInfo
	if user.Username != "system:serviceaccount:"+ns+":robot" || user.Extra["authentication.kubernetes.io/pod-name"][0] != "asks" || user.Extra["authentication.kubernetes.io/node-name"][0] != n.Name {
		t.Errorf("the API takes the pod for %+v", user)
	}
	// What it may not do: it is nobody special.
	forbidden := fmt.Sprintf(`probe get %s/api/v1/namespaces/%s/secrets "Authorization:Bearer $(cat %stoken)" %sca.crt; echo exit $?`, api, ns, dir, dir)
	if out := n.RunPod(t, ns, "asks-more", forbidden, "serviceAccountName: robot,"); !strings.Contains(out, `"reason": "Forbidden"`) && !strings.Contains(out, `"reason":"Forbidden"`) || !strings.Contains(out, "exit 22") {
		t.Errorf("the API answers %s", out)
	}
	// A token for another audience is none for the API.
	out = n.RunPodWith(t, ns, "other-audience", ask("/t/token")+"; echo exit $?",
		`volumes: [{name: t, projected: {sources: [{serviceAccountToken: {path: token, audience: vault, expirationSeconds: 600}}, {configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}}]}}],`,
		`volumeMounts: [{name: t, mountPath: /t}],`)
	if !strings.Contains(out, "Unauthorized") || !strings.Contains(out, "exit 22") {
		t.Errorf("with a token for another audience the API answers %s", out)
	}
	out = n.RunPod(t, ns, "no-token", "ls "+dir+" 2>/dev/null | grep -c token || true", "automountServiceAccountToken: false,")
	if strings.TrimSpace(out) != "0" {
		t.Errorf("a pod that wants no token has %s", out)
	}
}
