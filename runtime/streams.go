package runtime

import (
	"net/http"
	"reflect"

	"github.com/containerd/containerd/v2/cmd/containerd/server"
	"k8s.io/cri-streaming/pkg/streaming"

	"kedge/internal/lastbytes"
	"kedge/runtime/unexported"
)

// delayStreamClose makes the CRI's streaming server for exec, attach and port-forward delay the closing of a
// connection until the kubelet has read all data. containerd has no setting for it; like moveCNICache the
// function sets unexported fields:
//
//	the CRI's service → streamServer → server
func delayStreamClose(srv *server.Server) error {
	service, err := criService(srv)
	if err != nil {
		return err
	}
	streams, err := unexported.Field[streaming.Server](service, "streamServer")
	if err != nil {
		return err
	}
	serving, err := unexported.Field[*http.Server](reflect.ValueOf(*streams), "server")
	if err != nil {
		return err
	}
	(*serving).Handler = lastbytes.Handler((*serving).Handler)
	return nil
}
