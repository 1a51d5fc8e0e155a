package logging

import (
	"testing"

	"k8s.io/klog/v2"
)

// A fatal message goes to the component whose code logged it, where there is one, and ends
// the goroutine in any case.
func TestFatalOf(t *testing.T) {
	defer func(before func(int)) { klog.OsExit = before }(klog.OsExit)
	var got string
	OnFatal(func() { got = "all" })
	fatal := func() (whose string) {
		got = ""
		done := make(chan struct{})
		wentOn := false
		go func() {
			defer close(done)
			klog.OsExit(255)
			wentOn = true
		}()
		<-done
		if wentOn {
			t.Error("the goroutine went on")
		}
		return got
	}
	if whose := fatal(); whose != "all" {
		t.Errorf("without an owner it was of %q", whose)
	}
	release := FatalOf(func() { got = "logging" }, "some/other/package", "kedge/internal/logging")
	FatalOf(func() { got = "prefix" }, "kedge/internal/log", "kedge/intern")()
	if whose := fatal(); whose != "logging" {
		t.Errorf("with an owner it was of %q", whose)
	}
	release()
	if whose := fatal(); whose != "all" {
		t.Errorf("after its owner has ended it was of %q", whose)
	}
	for name, want := range map[string]bool{
		"k8s.io/kubernetes/pkg/kubelet.(*Kubelet).Run":         true,
		"k8s.io/kubernetes/pkg/kubelet/cm.NewContainerManager": true,
		"k8s.io/kubernetes/pkg/kubeletfoo.F":                   false,
		"k8s.io/kubernetes/pkg/controller.F":                   false,
	} {
		release := FatalOf(func() {}, "k8s.io/kubernetes/pkg/kubelet")
		if own := fatalOwner([]string{"runtime.goexit", name}) != nil; own != want {
			t.Errorf("%s: owned %v, want %v", name, own, want)
		}
		release()
	}
}
