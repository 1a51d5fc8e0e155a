package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/internal/cgroup"
)

// limitCgroup is the cgroup of the measured processes. It includes shims; pods have cgroups of their own.
const limitCgroup = "/kbench-limit"

// limitSteps are the limits that are tried, in MiB.
var limitSteps = []int{96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 272, 288, 320, 352, 384, 416, 448, 480, 512}

// limitPods is the number of pods that must run within a limit.
const limitPods = 10

// smallestLimit searches the smallest sufficient step, o.runs times.
func smallestLimit(ctx context.Context, o options, c composition, images string, r *report) error {
	for i := range o.runs {
		var failure error
		found := sort.Search(len(limitSteps), func(n int) bool {
			if failure != nil {
				return true
			}
			err := tryLimit(ctx, c, images, limitSteps[n])
			if ctx.Err() != nil {
				failure = context.Cause(ctx)
			}
			verdict := "enough"
			if err != nil {
				verdict, _, _ = strings.Cut(err.Error(), "\n")
			}
			fmt.Fprintf(os.Stderr, "run %d of %d: %s with %d MiB: %s\n", i+1, o.runs, c.name(), limitSteps[n], verdict)
			return err == nil
		})
		if failure != nil {
			return failure
		}
		if found == len(limitSteps) {
			return fmt.Errorf("%d MiB are not enough for %s", limitSteps[found-1], c.name())
		}
		r.add(figure{"smallest memory limit", "MiB"}, c.name(), float64(limitSteps[found]))
	}
	return nil
}

// tryLimit returns nil if the composition starts in a cgroup of that size, runs the pods, and then answers each
// request within a second.
func tryLimit(ctx context.Context, c composition, images string, mib int) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("timed out after two minutes"))
	defer cancel()
	if err := cgroup.EnsureGroup(limitCgroup); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(), cgroup.Clear(limitCgroup)) }()
	group, err := limitMemory(mib)
	if err != nil {
		return err
	}
	c.startIn(group)
	defer c.startIn("")
	if err := c.prepare(ctx, images); err != nil {
		return err
	}
	if _, err := start(ctx, c, "first"); err != nil {
		return errors.Join(err, killed(group))
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	for n := range limitPods - 1 {
		if err := createPod(ctx, client, fmt.Sprint("pod-", n)); err != nil {
			return err
		}
	}
	if err := waitAllRunning(ctx, c, client); err != nil {
		return errors.Join(err, killed(group))
	}
	if err := sleep(ctx, 5*time.Second); err != nil {
		return context.Cause(ctx)
	}
	for range 10 {
		if err := answers(ctx, client); err != nil {
			return err
		}
		if err := sleep(ctx, 500*time.Millisecond); err != nil {
			return context.Cause(ctx)
		}
	}
	return errors.Join(c.failed(), killed(group))
}

func waitAllRunning(ctx context.Context, c composition, client kubernetes.Interface) error {
	for {
		running := 0
		list, err := client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		if err == nil {
			for _, p := range list.Items {
				if p.Status.Phase == corev1.PodRunning {
					running++
				}
			}
		}
		if running == limitPods {
			return nil
		}
		if err := c.failed(); err != nil {
			return err
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("%d of %d pods run: %w", running, limitPods, context.Cause(ctx))
		}
	}
}

// answers returns an error if a request takes longer than a second.
func answers(ctx context.Context, client *kubernetes.Clientset) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Second, errors.New("no answer within a second"))
	defer cancel()
	if err := client.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
		return fmt.Errorf("/readyz: %w", err)
	}
	if _, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{}); err != nil {
		return fmt.Errorf("list of pods: %w", err)
	}
	return nil
}

// limitMemory limits the cgroup and returns its folder in the memory hierarchy.
func limitMemory(mib int) (string, error) {
	dirs, err := cgroup.Dirs(limitCgroup)
	if err != nil {
		return "", err
	}
	value := []byte(strconv.Itoa(mib << 20))
	for _, d := range dirs {
		for _, file := range []string{"memory.max", "memory.limit_in_bytes"} {
			if _, err := os.Stat(filepath.Join(d, file)); err == nil {
				return d, os.WriteFile(filepath.Join(d, file), value, 0o644)
			}
		}
	}
	return "", errors.New("no cgroup hierarchy of this machine can limit memory")
}

// killed returns an error if the kernel has killed a process of the cgroup for memory.
func killed(group string) error {
	for _, file := range []string{"memory.events", "memory.oom_control"} {
		data, err := os.ReadFile(filepath.Join(group, file))
		if err != nil {
			continue
		}
		for line := range bytes.Lines(data) {
			if n, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("oom_kill ")); ok && string(n) != "0" {
				return errors.New("the kernel has killed a process (out of memory)")
			}
		}
	}
	return nil
}
