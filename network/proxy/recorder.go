package proxy

import (
	"context"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
)

// recorder records events of services. The trackers get it when they are made, and what delivers events has goroutines:
// these run from begin to end, and an event at any other time is dropped.
type recorder struct {
	sink    events.EventSink
	current atomic.Pointer[events.EventRecorderLogger] // nil outside of begin and end
}

// Eventf implements events.EventRecorder.
func (r *recorder) Eventf(regarding, related runtime.Object, kind, reason, action, note string, args ...any) {
	if current := r.current.Load(); current != nil {
		(*current).Eventf(regarding, related, kind, reason, action, note, args...)
	}
}

// begin delivers events until ctx ends or the function that it returns is called, which must be.
func (r *recorder) begin(ctx context.Context) (end func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	broadcaster := events.NewBroadcaster(r.sink)
	end = func() {
		r.current.Store(nil)
		cancel()
		broadcaster.Shutdown()
	}
	if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		end()
		return nil, err
	}
	current := broadcaster.NewRecorder(scheme.Scheme, "kedge-proxy")
	r.current.Store(&current)
	return end, nil
}
