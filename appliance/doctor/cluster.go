package doctor

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// cluster has the objects of the cluster that findings come from.
type cluster struct {
	nodes []corev1.Node
	pods  []corev1.Pod
	more  bool // there are more pods than were read
}

const (
	mostPods     = 2000 // that are read
	mostFindings = 20   // about pods
	creating     = 2 * time.Minute
)

func readCluster(ctx context.Context, s *subject) (cluster, error) {
	var c cluster
	switch {
	case s.state != Running:
		return c, skip("kedge is not running")
	case s.Kubeconfig == "":
		return c, skip("an agent has no kubeconfig of the administrator; run \"kedge doctor\" on a server too")
	}
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		return c, fmt.Errorf("read the administrator's kubeconfig: %w", err)
	}
	config.Timeout = slow
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return c, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return c, fmt.Errorf("list nodes: %w", err)
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{Limit: mostPods})
	if err != nil {
		return c, fmt.Errorf("list pods: %w", err)
	}
	return cluster{nodes.Items, pods.Items, pods.Continue != ""}, nil
}

func judgeCluster(s *subject, c cluster) []Finding {
	found := judgeNodes(c.nodes)
	down := map[string]bool{}
	for _, f := range found {
		if name, ok := strings.CutPrefix(f.Subject, "node "); ok && f.Level == Problem {
			down[name] = true
		}
	}
	pods := judgeImages(c.pods)
	for i := range c.pods {
		if p := &c.pods[i]; !down[p.Spec.NodeName] {
			pods = append(pods, judgePod(s, p)...)
		}
	}
	if n := len(pods) - mostFindings; n > 0 {
		pods = append(pods[:mostFindings], Finding{Level: Problem, Subject: "pods", What: fmt.Sprintf("%s more of this kind are left out", plural(n, "finding")), Remedy: "kedge kubectl get pods -A"})
	}
	if c.more {
		pods = append(pods, Finding{Level: Unknown, Subject: "pods", What: fmt.Sprintf("the cluster has more than %d pods, and the others were not read", mostPods), Remedy: "kedge kubectl get pods -A"})
	}
	return append(found, pods...)
}

func judgeNodes(nodes []corev1.Node) (found []Finding) {
	versions := map[string][]string{}
	for _, n := range nodes {
		versions[n.Status.NodeInfo.KubeletVersion] = append(versions[n.Status.NodeInfo.KubeletVersion], n.Name)
		for _, cond := range n.Status.Conditions {
			f := Finding{Level: Warning, Subject: "node " + n.Name, Since: cond.LastTransitionTime.Time, Remedy: "kedge kubectl describe node " + n.Name}
			switch {
			case cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionUnknown:
				f.Level, f.What = Problem, "the node is NotReady: it does not report to the API any more"
				f.Remedy = "see that the machine is on, reaches the server, and runs kedge; \"kedge doctor\" there says more"
			case cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionFalse:
				f.Level, f.What = Problem, "the node is NotReady: "+cond.Message
				f.Remedy = "\"kedge doctor\" on this node says more; " + f.Remedy
			case cond.Type != corev1.NodeReady && cond.Status == corev1.ConditionTrue &&
				slices.Contains([]corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure, corev1.NodeNetworkUnavailable}, cond.Type):
				f.What = fmt.Sprintf("the node has %s: %s", cond.Type, cond.Message)
			default:
				continue
			}
			found = append(found, f)
		}
	}
	if len(versions) > 1 {
		var parts []string
		for _, v := range slices.Sorted(maps.Keys(versions)) {
			parts = append(parts, fmt.Sprintf("%s on %s", v, some(versions[v])))
		}
		found = append(found, Finding{Level: Warning, Subject: "versions", What: "the nodes run different versions: " + strings.Join(parts, "; "), Remedy: "install the newest of them on all machines, servers first, and restart kedge there"})
	}
	return found
}

// pullReasons are reasons of the kubelet for an image that it does not have.
var pullReasons = []string{"ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "RegistryUnavailable"}

// judgeImages returns a finding for each image that pods wait for.
func judgeImages(pods []corev1.Pod) (found []Finding) {
	type wanted struct {
		pods    []string
		message string
		since   time.Time
	}
	images := map[string]*wanted{}
	for i := range pods {
		p := &pods[i]
		for _, c := range containers(p) {
			w := c.State.Waiting
			if w == nil || !slices.Contains(pullReasons, w.Reason) {
				continue
			}
			image := images[c.Image]
			if image == nil {
				image = &wanted{}
				images[c.Image] = image
			}
			if name := p.Namespace + "/" + p.Name; !slices.Contains(image.pods, name) {
				image.pods = append(image.pods, name)
			}
			if len(w.Message) > len(image.message) {
				image.message = w.Message
			}
			if at := begun(p); image.since.IsZero() || at.Before(image.since) {
				image.since = at
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(images)) {
		w := images[name]
		what := fmt.Sprintf("the image cannot be pulled, and pods wait for it (%s)", some(w.pods))
		if w.message != "" {
			what += ": " + w.message
		}
		found = append(found, Finding{Level: Problem, Subject: "image " + name, Since: w.since, What: what,
			Remedy: fmt.Sprintf("\"kedge images pull %s\" on the node shows the error; see the name, the registry and its credentials (imagePullSecrets, --private-registry), or import an archive with \"kedge images import\"", name)})
	}
	return found
}

func containers(p *corev1.Pod) []corev1.ContainerStatus {
	return slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses)
}

// begun returns when a node took the pod, or when the pod was created.
func begun(p *corev1.Pod) time.Time {
	if p.Status.StartTime != nil {
		return p.Status.StartTime.Time
	}
	return p.CreationTimestamp.Time
}

// judgePod returns why a pod cannot start. Images are found by judgeImages.
func judgePod(s *subject, p *corev1.Pod) (found []Finding) {
	describe := fmt.Sprintf("kedge kubectl describe pod -n %s %s", p.Namespace, p.Name)
	add := func(l Level, since time.Time, what, remedy string) {
		found = append(found, Finding{Level: l, Subject: fmt.Sprintf("pod %s/%s", p.Namespace, p.Name), What: what, Since: since, Remedy: remedy})
	}
	for _, cond := range p.Status.Conditions {
		if cond.Type == corev1.PodScheduled && cond.Status == corev1.ConditionFalse && p.Status.Phase == corev1.PodPending {
			if cond.Reason == corev1.PodReasonUnschedulable {
				add(Problem, cond.LastTransitionTime.Time, "no node takes the pod (Unschedulable): "+cond.Message, describe)
			} else {
				add(Warning, cond.LastTransitionTime.Time, fmt.Sprintf("the pod is not scheduled (%s): %s", cond.Reason, cond.Message), describe)
			}
		}
	}
	for _, c := range containers(p) {
		w := c.State.Waiting
		if w == nil || slices.Contains(pullReasons, w.Reason) {
			continue
		}
		switch w.Reason {
		case "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError", "PostStartHookError":
			add(Problem, begun(p), fmt.Sprintf("container %s does not start (%s): %s", c.Name, w.Reason, w.Message), describe)
		case "CrashLoopBackOff":
			what := fmt.Sprintf("container %s exits again and again (CrashLoopBackOff, %s)", c.Name, plural(int(c.RestartCount), "restart"))
			var since time.Time
			if last := c.LastTerminationState.Terminated; last != nil {
				what += fmt.Sprintf(", last with exit code %d (%s)", last.ExitCode, last.Reason)
				since = last.FinishedAt.Time
			}
			add(Problem, since, what, fmt.Sprintf("kedge kubectl logs -n %s %s -c %s --previous", p.Namespace, p.Name, c.Name))
		case "ContainerCreating":
			if p.Status.Phase == corev1.PodPending && s.now.Sub(begun(p)) > creating {
				add(Warning, begun(p), fmt.Sprintf("container %s is still being created (ContainerCreating)", c.Name), describe+" shows what it waits for, often a volume, a secret or the network")
			}
		}
	}
	return found
}
