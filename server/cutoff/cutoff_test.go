package cutoff

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes/scheme"
)

// leader is one that comes and goes.
type leader struct {
	mu      sync.Mutex
	known   bool
	changed chan struct{}
}

func (l *leader) get() (bool, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.known, l.changed
}

func (l *leader) set(known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.known, l.changed = known, make(chan struct{})
}

// asked is a request that may go on.
type asked struct {
	answer *httptest.ResponseRecorder
	ended  chan struct{}
}

func (a asked) over() bool {
	select {
	case <-a.ended:
		return true
	default:
		return false
	}
}

func TestCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &leader{known: true, changed: make(chan struct{})}
		c := New(l.get)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go c.Follow(ctx)
		own := func(r *http.Request) bool { return r.Header.Get("Own") != "" }
		h := c.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if info, _ := request.RequestInfoFrom(r.Context()); info.Verb == "watch" {
				<-r.Context().Done()
			}
		}), scheme.Codecs, own)
		ask := func(verb, from string) asked {
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/api/v1/pods", nil)
			r = r.WithContext(request.WithRequestInfo(r.Context(), &request.RequestInfo{IsResourceRequest: true, Verb: verb, APIVersion: "v1"}))
			r.Header.Set("Own", from)
			a := asked{httptest.NewRecorder(), make(chan struct{})}
			go func() {
				defer close(a.ended)
				h.ServeHTTP(a.answer, r)
			}()
			synctest.Wait()
			return a
		}

		watch, inside := ask("watch", ""), ask("watch", "this process")
		l.set(false)
		time.Sleep(Patience / 2)
		l.set(true)
		time.Sleep(2 * Patience)
		synctest.Wait()
		if watch.over() {
			t.Fatal("an election has ended a watch")
		}
		if get := ask("get", ""); !get.over() || get.answer.Header().Get("Connection") != "" {
			t.Errorf("a request while all is well: %v", get.answer.Header())
		}

		l.set(false)
		time.Sleep(Patience + time.Millisecond)
		synctest.Wait()
		if !watch.over() {
			t.Error("a watch goes on without a leader")
		}
		if inside.over() {
			t.Error("a watch of this process has ended")
		}
		if again := ask("watch", ""); !again.over() || again.answer.Code != http.StatusServiceUnavailable || again.answer.Header().Get("Connection") != "close" {
			t.Errorf("another watch: %d, %v", again.answer.Code, again.answer.Header())
		}
		if get := ask("get", ""); !get.over() || get.answer.Code != http.StatusOK || get.answer.Header().Get("Connection") != "close" {
			t.Errorf("another request: %d, %v", get.answer.Code, get.answer.Header())
		}

		l.set(true)
		synctest.Wait()
		if watch := ask("watch", ""); watch.over() {
			t.Errorf("a watch when there is a leader again: %d", watch.answer.Code)
		}
		stop()
		synctest.Wait()
	})
}
