package agent

import (
	"context"
	"fmt"
	"reflect"
	"time"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/kubernetes/pkg/kubelet"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/volumemanager"
	"k8s.io/kubernetes/pkg/kubelet/volumemanager/populator"
	"k8s.io/kubernetes/pkg/kubelet/volumemanager/reconciler"
	volumeutil "k8s.io/kubernetes/pkg/volume/util"

	"kedge/internal/lifecycle"
	"kedge/runtime/unexported"
)

// A pod waits for its volumes before its sandbox is created, and almost every pod has a volume: the token of
// its service account. Upstream's volume manager has two loops, one for the volumes that pods want and one that
// mounts them, each with an interval of 0.1 s; a waiting pod checks every 0.3 s. A volume is mounted after
// three intervals. That takes 0.3 s of the half second in which a pod starts, and 0.6 s if the token is late.
// The end of a pod is delayed in the same way.
//
// Here the waiting pod wakes the loops. Upstream's passes are called one at a time, each from one goroutine, as
// in upstream; only the times of the calls differ. TestVolumeManagerMatchesUpstream of scripts/house fails
// when upstream changes the code on which this depends.

// volumeLoop is upstream's interval of a loop, which applies if no waiting pod wakes the loop.
const volumeLoop = 100 * time.Millisecond

// A waiting pod checks after volumeFirstLook, and then at growing intervals up to volumeLastLook; then
// upstream's wait takes over.
const (
	volumeFirstLook = 2 * time.Millisecond
	volumeLastLook  = volumeLoop
)

// populatorPass is one pass of the loop that determines the volumes of the pods.
//
//go:linkname populatorPass k8s.io/kubernetes/pkg/kubelet/volumemanager/populator.(*desiredStateOfWorldPopulator).populatorLoop
func populatorPass(populator unsafe.Pointer, ctx context.Context)

// reconcilerPass is one pass of the loop that mounts and unmounts volumes.
//
//go:linkname reconcilerPass k8s.io/kubernetes/pkg/kubelet/volumemanager/reconciler.(*reconciler).reconcile
func reconcilerPass(reconciler unsafe.Pointer, ctx context.Context)

// promptVolumes is upstream's volume manager, whose loops are woken by pods that wait for volumes.
type promptVolumes struct {
	volumemanager.VolumeManager

	populator *promptPopulator
	mounts    *promptReconciler
}

// installPromptVolumes replaces the kubelet's volume manager by promptVolumes after upstream has created it and before it
// runs. The fields are unexported: if upstream changes them, the kubelet fails at its start.
func installPromptVolumes(a *attempt, d *kubelet.Dependencies) {
	d.Options = append(d.Options, func(k *kubelet.Kubelet) {
		if err := replaceVolumeManager(k); err != nil {
			a.fatal(fmt.Errorf("wake the kubelet's volume manager: %w", err))
		}
	})
}

func replaceVolumeManager(k *kubelet.Kubelet) error {
	manager, err := unexported.Field[volumemanager.VolumeManager](reflect.ValueOf(k), "volumeManager")
	if err != nil {
		return err
	}
	wants, err := unexported.Field[populator.DesiredStateOfWorldPopulator](reflect.ValueOf(*manager), "desiredStateOfWorldPopulator")
	if err != nil {
		return err
	}
	mounts, err := unexported.Field[reconciler.Reconciler](reflect.ValueOf(*manager), "reconciler")
	if err != nil {
		return err
	}
	v := promptVolumes{
		VolumeManager: *manager,
		populator:     &promptPopulator{DesiredStateOfWorldPopulator: *wants, wake: lifecycle.NewWakeup()},
		mounts:        &promptReconciler{Reconciler: *mounts, wake: lifecycle.NewWakeup()},
	}
	*wants, *mounts, *manager = v.populator, v.mounts, v
	return nil
}

// WaitForAttachAndMount returns when all volumes that a pod's containers use are mounted.
func (v promptVolumes) WaitForAttachAndMount(ctx context.Context, pod *corev1.Pod) error {
	if pod != nil {
		mounts, devices, _ := volumeutil.GetPodVolumeNames(pod, false)
		wanted, name := mounts.Union(devices), volumeutil.GetUniquePodName(pod)
		v.wakeUntil(ctx, func() bool {
			mounted := v.GetMountedVolumesForPod(name)
			for volume := range wanted {
				if _, ok := mounted[volume]; !ok {
					return false
				}
			}
			return true
		})
	}
	return v.VolumeManager.WaitForAttachAndMount(ctx, pod) // which has the error if mounting failed
}

// WaitForUnmount returns when none of the pod's volumes is mounted any more.
func (v promptVolumes) WaitForUnmount(ctx context.Context, pod *corev1.Pod) error {
	if pod != nil {
		name := volumeutil.GetUniquePodName(pod)
		v.wakeUntil(ctx, func() bool { return len(v.GetMountedVolumesForPod(name)) == 0 })
	}
	return v.VolumeManager.WaitForUnmount(ctx, pod)
}

// wakeUntil wakes the loops until done returns true, ctx ends, or half a second has passed: after that upstream's
// intervals are short in comparison.
func (v promptVolumes) wakeUntil(ctx context.Context, done func() bool) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait := volumeFirstLook; !done() && wait < volumeLastLook; wait = wait * 5 / 4 {
		v.populator.wake.Wake()
		v.mounts.wake.Wake()
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
	}
}

// runLoop calls pass at once, when woken, and every volumeLoop, until end is closed.
func runLoop(ctx context.Context, end <-chan struct{}, woken <-chan struct{}, pass func()) {
	timer := time.NewTimer(volumeLoop)
	defer timer.Stop()
	for {
		select {
		case <-end:
			return
		default:
		}
		func() {
			defer utilruntime.HandleCrashWithContext(ctx) // like upstream's loops
			pass()
		}()
		timer.Reset(volumeLoop)
		select {
		case <-end:
			return
		case <-woken:
		case <-timer.C:
		}
	}
}

// promptPopulator is upstream's populator with a loop that can be woken.
type promptPopulator struct {
	populator.DesiredStateOfWorldPopulator

	wake lifecycle.Wakeup
}

// Run runs until ctx ends. Upstream's Run does the first part: it waits until all sources of pods have
// delivered their pods.
func (p *promptPopulator) Run(ctx context.Context, sources kubeletconfig.SourcesReady) {
	first, end := context.WithCancel(ctx)
	defer end()
	go func() {
		for !p.HasAddedPods() && first.Err() == nil {
			time.Sleep(volumeLoop / 10)
		}
		end()
	}()
	p.DesiredStateOfWorldPopulator.Run(first, sources)
	receiver := reflect.ValueOf(p.DesiredStateOfWorldPopulator).UnsafePointer()
	runLoop(ctx, ctx.Done(), p.wake, func() { populatorPass(receiver, ctx) })
}

// promptReconciler is upstream's reconciler with a loop that can be woken.
type promptReconciler struct {
	reconciler.Reconciler

	wake lifecycle.Wakeup
}

// Run runs until end is closed. Upstream's Run does the first part, and then returns because its channel is
// closed: it reconstructs the volumes that an earlier kubelet has left mounted.
func (r *promptReconciler) Run(ctx context.Context, end <-chan struct{}) {
	ended := make(chan struct{})
	close(ended)
	r.Reconciler.Run(ctx, ended)
	receiver := reflect.ValueOf(r.Reconciler).UnsafePointer()
	runLoop(ctx, end, r.wake, func() { reconcilerPass(receiver, ctx) })
}
