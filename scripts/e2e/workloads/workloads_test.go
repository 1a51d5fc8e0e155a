package workloads

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// box is the template of a workload's pod with one container.
func box(app, script, spec string) string {
	return fmt.Sprintf(`{metadata: {labels: {app: %s}}, spec: {terminationGracePeriodSeconds: 1, %s containers: [{name: main, image: %q, command: [sh, -c, %q]}]}}`, app, spec, harness.Busybox, script)
}

func TestDeployment(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	deploy := func(text string) {
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {replicas: 2, selector: {matchLabels: {app: web}}, strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}},
			template: %s}}`, box("web", "exec probe serve :8080 "+text, "")))
	}
	// All pods serve text, and the rollout left exactly two.
	served := func(text string) {
		t.Helper()
		n.Kubectl(t, "rollout", "status", "-n", ns, "deployment/web", "--timeout=60s")
		harness.Eventually(t, 20*time.Second, func() error {
			pods := n.PodsOf(t, ns, "web")
			if len(pods) != 2 {
				return fmt.Errorf("there are %d pods", len(pods))
			}
			for _, p := range pods {
				if err := harness.CheckAnswer("http://"+p.Status.PodIP+":8080/", text); err != nil {
					return err
				}
			}
			return nil
		})
	}
	deploy("one")
	served("one")
	deploy("two")
	served("two")
	if got := n.Kubectl(t, "get", "rs", "-n", ns, "-o", "jsonpath={range .items[*]}{.spec.replicas} {end}"); got != "0 2 " && got != "2 0 " {
		t.Errorf("replica sets have %q", got)
	}
	n.Kubectl(t, "rollout", "undo", "-n", ns, "deployment/web")
	served("one")
	// A version that never gets ready does not take the place of one that is.
	n.Kubectl(t, "patch", "deployment", "-n", ns, "web", "-p", `{"spec":{"progressDeadlineSeconds":4,"template":{"spec":{"containers":[{"name":"main","readinessProbe":{"exec":{"command":["false"]},"periodSeconds":1}}]}}}}`)
	if out, err := n.TryKubectl(nil, "rollout", "status", "-n", ns, "deployment/web", "--timeout=40s"); err == nil || !strings.Contains(out, "exceeded its progress deadline") {
		t.Errorf("a broken version: %v: %s", err, out)
	}
	serving := 0
	for _, p := range n.PodsOf(t, ns, "web") {
		if harness.ContainerStatus(&p, "main").Ready && harness.CheckAnswer("http://"+p.Status.PodIP+":8080/", "one") == nil {
			serving++
		}
	}
	if serving != 2 {
		t.Errorf("%d pods serve while a broken version is rolled out", serving)
	}
}

func TestReplicaSetHealsAndScales(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: r}, spec: {replicas: 2, selector: {matchLabels: {app: r}}, template: %s}}`, box("r", "exec sleep 3600", "")))
	ready := func(want int) (names []string) {
		t.Helper()
		harness.Eventually(t, 40*time.Second, func() error {
			pods := n.PodsOf(t, ns, "r")
			names = nil
			for name, p := range pods {
				if harness.ContainerStatus(&p, "main").Ready {
					names = append(names, name)
				}
			}
			if len(names) != want || len(pods) != want {
				return fmt.Errorf("%d of %d pods are ready, want %d", len(names), len(pods), want)
			}
			return nil
		})
		return names
	}
	first := ready(2)
	n.Kubectl(t, "delete", "pod", "-n", ns, first[0], "--wait")
	if second := ready(2); slices.Contains(second, first[0]) || !slices.Contains(second, first[1]) {
		t.Errorf("pods were %v and are %v", first, second)
	}
	n.Kubectl(t, "scale", "-n", ns, "rs/r", "--replicas=3")
	ready(3)
	n.Kubectl(t, "scale", "-n", ns, "rs/r", "--replicas=0")
	ready(0)
	// Pods go with their owner.
	n.Kubectl(t, "scale", "-n", ns, "rs/r", "--replicas=1")
	gone := ready(1)[0]
	n.Kubectl(t, "delete", "rs", "-n", ns, "r")
	waitGone(t, n, ns, gone)
}

func TestStatefulSet(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	class, dirs := ns+"-sts", []string{harness.HostDir(t), harness.HostDir(t)}
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: storage.k8s.io/v1, kind: StorageClass, metadata: {name: %s}, provisioner: kubernetes.io/no-provisioner, volumeBindingMode: WaitForFirstConsumer}`, class))
	t.Cleanup(func() {
		n.TryKubectl(nil, "delete", "--wait=false", "storageclass/"+class, "pv/"+class+"-0", "pv/"+class+"-1")
	})
	for i, dir := range dirs {
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: PersistentVolume, metadata: {name: %s-%d}, spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], storageClassName: %s, hostPath: {path: %s}}}`, class, i, class, dir))
	}
	n.Apply(t, ns, fmt.Sprintf(`
{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: None, selector: {app: db}, ports: [{port: 80}]}}
---
{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: db}, spec: {serviceName: db, replicas: 2, selector: {matchLabels: {app: db}},
	volumeClaimTemplates: [{metadata: {name: data}, spec: {accessModes: [ReadWriteOnce], storageClassName: %s, resources: {requests: {storage: 1Mi}}}}],
	template: {metadata: {labels: {app: db}}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, volumeMounts: [{name: data, mountPath: /data}],
		command: [sh, -c, "echo $(hostname) >>/data/log; hostname -f; exec sleep 3600"]}]}}}}`, class, harness.Busybox))
	n.Kubectl(t, "rollout", "status", "-n", ns, "statefulset/db", "--timeout=60s")
	one, two := n.WaitPod(t, ns, "db-0", false), n.WaitPod(t, ns, "db-1", false)
	if started := harness.ContainerStatus(one, "main").State.Running.StartedAt; two.CreationTimestamp.Before(&started) {
		t.Error("the second pod did not wait for the first")
	}
	if got := n.Kubectl(t, "logs", "-n", ns, "db-1"); strings.TrimSpace(got) != "db-1.db."+ns+".svc.cluster.local" {
		t.Errorf("the second pod's name is %q", got)
	}
	logs := []string{harness.FileContent(dirs[0], "log"), harness.FileContent(dirs[1], "log")}
	if slices.Sort(logs); !slices.Equal(logs, []string{"db-0", "db-1"}) {
		t.Errorf("volumes have %q", logs)
	}
	// A pod that is replaced has its name and its volume again.
	n.Kubectl(t, "delete", "pod", "-n", ns, "db-1", "--wait")
	harness.Eventually(t, 40*time.Second, func() error {
		p, err := n.Pod(ns, "db-1")
		if err != nil || p.UID == two.UID || !harness.ContainerStatus(p, "main").Ready {
			return fmt.Errorf("not yet replaced: %v", err)
		}
		return nil
	})
	logs = []string{harness.FileContent(dirs[0], "log"), harness.FileContent(dirs[1], "log")}
	if slices.Sort(logs); !slices.Equal(logs, []string{"db-0", "db-1\ndb-1"}) {
		t.Errorf("volumes have %q", logs)
	}
	n.Kubectl(t, "scale", "-n", ns, "statefulset/db", "--replicas=1")
	waitGone(t, n, ns, "db-1")
	if p, err := n.Pod(ns, "db-0"); err != nil || p.UID != one.UID {
		t.Errorf("the first pod did not stay: %v", err)
	}
}

func TestDaemonSet(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	fake := n.FakeNode(t, ns, "d", nil) // not tolerated: it gets no pod
	set := func(text string) {
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: d}, spec: {selector: {matchLabels: {app: d}}, template: %s}}`, box("d", "echo "+text+"; exec sleep 3600", "")))
		n.Kubectl(t, "rollout", "status", "-n", ns, "daemonset/d", "--timeout=60s")
	}
	for _, text := range []string{"one", "two"} {
		set(text)
		pods := n.PodsOf(t, ns, "d")
		for name, p := range pods {
			if p.Spec.NodeName != n.Name || len(pods) != 1 {
				t.Errorf("pods %v are on %s and others", len(pods), p.Spec.NodeName)
			}
			harness.Eventually(t, 10*time.Second, func() error { return n.LogsHave(ns, name, text) })
		}
		if len(pods) != 1 {
			t.Errorf("there are %d pods", len(pods))
		}
	}
	// Tolerated, the other node gets one as well.
	n.Kubectl(t, "patch", "daemonset", "-n", ns, "d", "-p", fmt.Sprintf(`{"spec":{"template":{"spec":{"tolerations":[{"key":"kedge.test/fake","value":%q}]}}}}`, ns))
	harness.Eventually(t, 20*time.Second, func() error {
		for _, p := range n.PodsOf(t, ns, "d") {
			if p.Spec.NodeName == fake {
				return nil
			}
		}
		return fmt.Errorf("no pod for %s", fake)
	})
}

func TestJobs(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	never := "restartPolicy: Never,"
	t.Run("parallel", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: parallel}, spec: {completions: 3, parallelism: 2, template: %s}}`, box("parallel", "sleep 1; echo done", never)))
		most := 0
		harness.Eventually(t, 60*time.Second, func() error {
			job, err := n.Client.BatchV1().Jobs(ns).Get(context.Background(), "parallel", metav1.GetOptions{})
			if err != nil {
				return err
			}
			most = max(most, int(job.Status.Active))
			if job.Status.Succeeded != 3 || job.Status.CompletionTime == nil {
				return fmt.Errorf("%d of 3 are done", job.Status.Succeeded)
			}
			return nil
		})
		if most != 2 {
			t.Errorf("%d pods ran at once, want 2", most)
		}
	})
	t.Run("indexed", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: indexed}, spec: {completions: 3, parallelism: 3, completionMode: Indexed, template: %s}}`, box("indexed", "echo $JOB_COMPLETION_INDEX $(hostname)", never)))
		n.Kubectl(t, "wait", "-n", ns, "job/indexed", "--for=condition=complete", "--timeout=60s")
		var out []string
		for name := range n.PodsOf(t, ns, "indexed") {
			out = append(out, strings.TrimSpace(n.Kubectl(t, "logs", "-n", ns, name)))
		}
		if slices.Sort(out); !slices.Equal(out, []string{"0 indexed-0", "1 indexed-1", "2 indexed-2"}) {
			t.Errorf("pods printed %q", out)
		}
	})
	t.Run("back-off-limit", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: fails}, spec: {backoffLimit: 1, template: %s}}`, box("fails", "exit 1", never)))
		n.Kubectl(t, "wait", "-n", ns, "job/fails", "--for=condition=failed", "--timeout=60s")
		if got := n.Kubectl(t, "get", "job", "-n", ns, "fails", "-o", "jsonpath={.status.failed} {.status.conditions[?(@.type=='Failed')].reason}"); got != "2 BackoffLimitExceeded" {
			t.Errorf("the job is %q", got)
		}
	})
	t.Run("cleaned-up", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: brief}, spec: {ttlSecondsAfterFinished: 2, activeDeadlineSeconds: 2, template: %s}}`, box("brief", "exec sleep 3600", never)))
		n.WaitEvent(t, ns, "brief", "DeadlineExceeded", "")
		harness.Eventually(t, 30*time.Second, func() error {
			if out, err := n.TryKubectl(nil, "get", "job,pod", "-n", ns, "-l", "job-name=brief", "-o", "name"); err != nil || out != "" {
				return fmt.Errorf("there is still %s%v", out, err)
			}
			return nil
		})
	})
}

func TestCronJob(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: CronJob, metadata: {name: c}, spec: {schedule: "* * * * *", jobTemplate: {spec: {template: %s}}}}`, box("c", "echo on time", "restartPolicy: Never,")))
	n.Kubectl(t, "create", "job", "-n", ns, "--from=cronjob/c", "by-hand")
	n.Kubectl(t, "wait", "-n", ns, "job/by-hand", "--for=condition=complete", "--timeout=60s")
	harness.Eventually(t, 100*time.Second, func() error {
		for name, p := range n.PodsOf(t, ns, "c") {
			if strings.HasPrefix(p.Labels["job-name"], "c-") && p.Status.Phase == corev1.PodSucceeded {
				return n.LogsHave(ns, name, "on time")
			}
		}
		return fmt.Errorf("the schedule has run nothing")
	})
}

func TestStaticPod(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	file := filepath.Join(n.DataDir(), "pod-manifests", ns+".yaml")
	manifest := "# The kubelet takes what begins with a brace for JSON.\n" + strings.Replace(harness.Shell("static", "exec probe serve :8080 from-a-file", ""), "metadata: {", "metadata: {namespace: "+ns+", ", 1)
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	name := "static-" + n.Name
	harness.Eventually(t, 60*time.Second, func() error {
		pod, err := n.Pod(ns, name)
		if err != nil {
			return err
		}
		return harness.CheckAnswer("http://"+pod.Status.PodIP+":8080/", "from-a-file")
	})
	// The API shows it, but does not command it.
	before, err := n.Pod(ns, name)
	if err != nil {
		t.Fatal(err)
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, name, "--force", "--wait=false")
	if err := harness.CheckAnswer("http://"+before.Status.PodIP+":8080/", "from-a-file"); err != nil {
		t.Errorf("deletion through the API has ended it: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	waitGone(t, n, ns, name)
	harness.Eventually(t, 20*time.Second, func() error {
		if harness.CheckAnswer("http://"+before.Status.PodIP+":8080/", "from-a-file") == nil {
			return fmt.Errorf("it runs without its file")
		}
		return nil
	})
}
