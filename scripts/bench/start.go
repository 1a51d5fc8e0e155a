package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// startLimit is the time limit of a start.
const startLimit = 3 * time.Minute

// poll is the interval between checks whether the API is ready.
const poll = 10 * time.Millisecond

// startTimes are the seconds since the first process was started.
type startTimes struct{ api, node, pod float64 }

func (s startTimes) record(r *report, composition, how string) {
	r.add(figure{"start to API ready, " + how, "s"}, composition, s.api)
	r.add(figure{"start to node Ready, " + how, "s"}, composition, s.node)
	r.add(figure{"start to new pod Running, " + how, "s"}, composition, s.pod)
}

// start starts the composition and creates one pod as soon as the API accepts it.
func start(ctx context.Context, c composition, podName string) (startTimes, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startLimit, errors.New("timed out"))
	defer cancel()
	var s startTimes
	began := time.Now()
	since := func() float64 { return time.Since(began).Seconds() }
	if err := c.start(ctx); err != nil {
		return s, err
	}
	client, err := waitAPI(ctx, c)
	if err != nil {
		return s, fmt.Errorf("the API is not ready: %w", err)
	}
	s.api = since()

	node, pod := make(chan error, 1), make(chan error, 1)
	go func() {
		err := waitNode(ctx, client, began)
		s.node = since()
		node <- err
	}()
	go func() {
		if err := createPod(ctx, client, podName); err != nil {
			pod <- err
			return
		}
		at, err := waitRunning(ctx, client, podName)
		s.pod = at.Sub(began).Seconds()
		pod <- err
	}()
	for range 2 {
		select {
		case err = <-node:
		case err = <-pod:
		}
		if err != nil {
			return s, errors.Join(fmt.Errorf("pod %s: %w", podName, err), c.failed())
		}
	}
	return s, nil
}

// waitAPI waits until /readyz on the API's port is ok.
func waitAPI(ctx context.Context, c composition) (*kubernetes.Clientset, error) {
	var client *kubernetes.Clientset
	for {
		if client == nil {
			client, _ = c.client() // the composition may have to write its kubeconfig first
		}
		if client != nil {
			if err := client.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err == nil {
				return client, nil
			}
		}
		if err := c.failed(); err != nil {
			return nil, err
		}
		if err := sleep(ctx, poll); err != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// waitNode waits for a Ready heartbeat that is newer than the start.
func waitNode(ctx context.Context, client kubernetes.Interface, began time.Time) error {
	return follow(ctx, func(ctx context.Context) (watch.Interface, error) {
		return client.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{})
	}, func(n *corev1.Node) bool {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				return c.Status == corev1.ConditionTrue && !c.LastHeartbeatTime.Time.Before(began.Truncate(time.Second))
			}
		}
		return false
	})
}

// createPod retries until the namespace has its service account.
func createPod(ctx context.Context, client kubernetes.Interface, name string) error {
	for {
		_, err := client.CoreV1().Pods("default").Create(ctx, podOf(name), metav1.CreateOptions{})
		if err == nil || apierrors.IsAlreadyExists(err) {
			return nil
		}
		if sleep(ctx, poll) != nil {
			return fmt.Errorf("create the pod: %w", err)
		}
	}
}

func podOf(name string) *corev1.Pod {
	grace := int64(0)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "bench"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers:                    []corev1.Container{{Name: "main", Image: image, ImagePullPolicy: corev1.PullIfNotPresent}},
		},
	}
}

func byName(name string) metav1.ListOptions {
	return metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()}
}

// waitRunning returns when the client has seen the phase Running.
func waitRunning(ctx context.Context, client kubernetes.Interface, name string) (time.Time, error) {
	err := follow(ctx, func(ctx context.Context) (watch.Interface, error) {
		return client.CoreV1().Pods("default").Watch(ctx, byName(name))
	}, func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodRunning })
	return time.Now(), err
}

// follow watches an object, repeatedly if necessary, until it has the wanted state.
func follow[T any](ctx context.Context, open func(context.Context) (watch.Interface, error), wanted func(T) bool) error {
	for {
		w, err := open(ctx)
		if err == nil {
			for e := range w.ResultChan() {
				if o, ok := e.Object.(T); ok && e.Type != watch.Deleted && wanted(o) {
					w.Stop()
					return nil
				}
			}
			w.Stop()
		}
		if sleep(ctx, poll) != nil {
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// deletePod returns when the pod is gone.
func deletePod(ctx context.Context, client kubernetes.Interface, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("pod %s was not deleted in time", name))
	defer cancel()
	zero := int64(0)
	if err := client.CoreV1().Pods("default").Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	for {
		if _, err := client.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			return nil
		}
		if sleep(ctx, poll) != nil {
			return context.Cause(ctx)
		}
	}
}

// pods measures pods one after the other, from before the create request to the event of the phase Running.
func pods(ctx context.Context, o options, c composition, client kubernetes.Interface, r *report) error {
	var took []float64
	for i := range o.pods {
		name := fmt.Sprint("pod-", i)
		one, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("pod %s is not running", name))
		w, err := client.CoreV1().Pods("default").Watch(one, byName(name))
		if err != nil {
			cancel()
			return err
		}
		began := time.Now()
		if err := createPod(one, client, name); err != nil {
			cancel()
			return err
		}
		running := false
		for e := range w.ResultChan() {
			if p, ok := e.Object.(*corev1.Pod); ok && p.Status.Phase == corev1.PodRunning {
				took, running = append(took, time.Since(began).Seconds()), true
				break
			}
		}
		w.Stop()
		err = context.Cause(one)
		cancel()
		if !running {
			return errors.Join(fmt.Errorf("pod %s is not running", name), err)
		}
		if err := deletePod(ctx, client, name); err != nil {
			return err
		}
	}
	slices.Sort(took)
	r.add(figure{"pod created to Running, p50", "s"}, c.name(), quantile(took, 0.5))
	r.add(figure{"pod created to Running, p99", "s"}, c.name(), quantile(took, 0.99))
	return nil
}

// quantile returns the nearest rank of sorted values.
func quantile(sorted []float64, q float64) float64 {
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}
