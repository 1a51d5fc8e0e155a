package workloads

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

func TestVolumes(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	dir := harness.HostDir(t)
	if err := os.WriteFile(filepath.Join(dir, "given"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o777); err != nil {
		t.Fatal(err)
	}
	kind := "awk '$2 == \"/v\" {print $3}' /proc/mounts"
	host := func(spec string) string {
		return fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s%s}}],", dir, spec)
	}
	const mount = "volumeMounts: [{name: v, mountPath: /v}],"
	for _, c := range []struct{ name, spec, container, script, want string }{
		{"empty-dir", "volumes: [{name: v, emptyDir: {}}],", mount, "ls -a /v | grep -c x; touch /v/x && stat -c %a /v; " + kind + " | grep -c tmpfs || true", "0 777 0"},
		{"empty-dir-in-memory", "volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 4Mi}}],", mount, kind + "; dd if=/dev/zero of=/v/f bs=1M count=8 2>/dev/null || stat -c %s /v/f", "tmpfs 4194304"},
		{"host-path", host(", type: Directory"), mount, "cat /v/given; echo by pod >/v/made", "from the host"},
		{"host-path-creates", host("/new, type: DirectoryOrCreate"), mount, "echo made >/v/f; ls /v", "f"},
		{"host-path-read-only", host(""), "volumeMounts: [{name: v, mountPath: /v, readOnly: true}],", "echo x 2>/dev/null >/v/no || echo refused", "refused"},
		{"host-path-file", host("/given, type: File"), mount, "cat /v", "from the host"},
		{"sub-path", host(""), "volumeMounts: [{name: v, mountPath: /v, subPath: sub}, {name: v, mountPath: /g, subPath: given}, {name: v, mountPath: /m, subPath: a/b}],", "ls /v; cat /g; echo sub >/v/f; echo deep >/m/f", "from the host"},
		{"sub-path-from-variable", host(""), "env: [{name: ME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}], volumeMounts: [{name: v, mountPath: /v, subPathExpr: logs-$(ME)}],", "echo mine >/v/f", ""},
		{"fs-group", "securityContext: {runAsUser: 1000, fsGroup: 4242}, volumes: [{name: v, emptyDir: {}}],", mount, "id -G; stat -c '%g %a' /v; touch /v/f; stat -c '%u %g' /v/f", "0 4242 4242 2777 1000 4242"},
		{"fs-group-of-secrets", "securityContext: {runAsUser: 1000, fsGroup: 4242}, volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: token}}]}}],", mount, "stat -L -c '%g %a' /v/token; test -r /v/token && echo readable", "4242 640 readable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got := strings.Join(strings.Fields(n.RunPodWith(t, ns, c.name, c.script, c.spec, c.container)), " ")
			if got != c.want {
				t.Errorf("printed %q, want %q", got, c.want)
			}
		})
	}
	t.Cleanup(func() { // after the pods of the rows above
		for file, want := range map[string]string{"made": "by pod", "new/f": "made", "no": "", "sub/f": "sub", "a/b/f": "deep", "logs-sub-path-from-variable/f": "mine"} {
			if got := harness.FileContent(dir, file); got != want {
				t.Errorf("%s on the host has %q, want %q", file, got, want)
			}
		}
	})
}

func TestSubPathCannotLeaveItsVolume(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	dir := harness.HostDir(t)
	if err := os.Symlink("/etc", filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	n.Apply(t, ns, harness.ShellWith("escapes", "ls /v", fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s}}],", dir), "volumeMounts: [{name: v, mountPath: /v, subPath: out}],"))
	harness.Eventually(t, 40*time.Second, func() error {
		pod, err := n.Pod(ns, "escapes")
		if err != nil {
			return err
		}
		if s := pod.Status.ContainerStatuses; len(s) == 1 && s[0].State.Waiting != nil && s[0].State.Waiting.Reason == "CreateContainerConfigError" && strings.Contains(s[0].State.Waiting.Message, "subPath") {
			return nil
		}
		return fmt.Errorf("status %+v", pod.Status.ContainerStatuses)
	})
}

func TestHostPathOfWrongTypeIsRefused(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("wrong", "true", fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s, type: Socket}}],", harness.HostDir(t)), "volumeMounts: [{name: v, mountPath: /v}],"))
	n.WaitEvent(t, ns, "wrong", "FailedMount", "hostPath type check failed")
}

func TestEmptyDirIsSharedAndOutlivesContainers(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {terminationGracePeriodSeconds: 1, volumes: [{name: v, emptyDir: {}}], containers: [
		{name: counts, image: %q, command: [sh, -c, "echo run >>/v/log; test $(grep -c run /v/log) = 2 && exec sleep 3600"], volumeMounts: [{name: v, mountPath: /v}]},
		{name: watches, image: %q, command: [sh, -c, "exec sleep 3600"], volumeMounts: [{name: v, mountPath: /w}]}]}}`, harness.Busybox, harness.Busybox))
	harness.Eventually(t, 60*time.Second, func() error {
		out, err := n.TryKubectl(nil, "exec", "-n", ns, "p", "-c", "watches", "--", "cat", "/w/log")
		if err != nil || out != "run\nrun\n" {
			return fmt.Errorf("the volume has %q: %v", out, err)
		}
		return nil
	})
	pod := n.WaitPod(t, ns, "p", false)
	volume := filepath.Join(n.DataDir(), "kubelet/pods", string(pod.UID), "volumes/kubernetes.io~empty-dir/v")
	if got := harness.FileContent(volume, "log"); got != "run\nrun" {
		t.Errorf("the host has %q in %s", got, volume)
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, "p")
	harness.Eventually(t, 30*time.Second, func() error {
		if _, err := os.Stat(volume); err == nil {
			return fmt.Errorf("%s is still there", volume)
		}
		return nil
	})
}

func TestPersistentVolumes(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	for _, c := range []struct{ kind, source, mode string }{
		{"host-path", "hostPath: {path: %s}", "Immediate"},
		{"local", "local: {path: %s}, nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [" + n.Name + "]}]}]}}", "WaitForFirstConsumer"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			t.Parallel()
			dir, name := harness.HostDir(t), ns+"-"+c.kind
			n.Apply(t, ns, fmt.Sprintf(`
{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {name: %s}, provisioner: kubernetes.io/no-provisioner, volumeBindingMode: %s}
---
{apiVersion: v1, kind: PersistentVolume, metadata: {name: %s}, spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], persistentVolumeReclaimPolicy: Retain, storageClassName: %s, %s}}
---
{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: %s}, spec: {accessModes: [ReadWriteOnce], storageClassName: %s, resources: {requests: {storage: 500Mi}}}}
`, name, c.mode, name, name, fmt.Sprintf(c.source, dir), c.kind, name))
			t.Cleanup(func() { n.TryKubectl(nil, "delete", "--wait=false", "pv/"+name, "storageclass/"+name) })
			claim := func() *corev1.PersistentVolumeClaim {
				pvc, err := n.Client.CoreV1().PersistentVolumeClaims(ns).Get(context.Background(), c.kind, metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				return pvc
			}
			if c.mode == "WaitForFirstConsumer" {
				n.WaitEvent(t, ns, c.kind, "WaitForFirstConsumer", "")
				if p := claim().Status.Phase; p != corev1.ClaimPending {
					t.Errorf("without a consumer the claim is %s", p)
				}
			} else {
				harness.Eventually(t, 30*time.Second, func() error {
					if p := claim().Status.Phase; p != corev1.ClaimBound {
						return fmt.Errorf("claim is %s", p)
					}
					return nil
				})
			}
			spec := fmt.Sprintf("volumes: [{name: v, persistentVolumeClaim: {claimName: %s}}],", c.kind)
			const mount = "volumeMounts: [{name: v, mountPath: /v}],"
			n.RunPodWith(t, ns, c.kind+"-writes", "echo kept >/v/f", spec, mount)
			if got := harness.FileContent(dir, "f"); got != "kept" {
				t.Errorf("the host has %q", got)
			}
			if got := n.RunPodWith(t, ns, c.kind+"-reads", "cat /v/f", spec, mount); got != "kept\n" {
				t.Errorf("the next pod reads %q", got)
			}
			if got := claim(); got.Status.Phase != corev1.ClaimBound || got.Spec.VolumeName != name {
				t.Errorf("claim is %s to %s", got.Status.Phase, got.Spec.VolumeName)
			}
			n.Kubectl(t, "delete", "pod,pvc", "-n", ns, c.kind+"-writes", c.kind+"-reads", c.kind, "--ignore-not-found", "--wait=false")
			harness.Eventually(t, 30*time.Second, func() error {
				pv, err := n.Client.CoreV1().PersistentVolumes().Get(context.Background(), name, metav1.GetOptions{})
				if err != nil || pv.Status.Phase != corev1.VolumeReleased {
					return fmt.Errorf("volume is %s: %v", pv.Status.Phase, err)
				}
				return nil
			})
			if got := harness.FileContent(dir, "f"); got != "kept" {
				t.Errorf("a retained volume has %q", got)
			}
		})
	}
}
