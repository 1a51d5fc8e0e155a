package lastbytes

import (
	"bufio"
	"net"
	"net/http"
)

// Hijack implements http.Hijacker.
func (r *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := r.hijacker.Hijack()
	if err != nil {
		return nil, nil, err
	}
	return Linger(conn), buffered, nil
}

// CloseNotify implements http.CloseNotifier, which the API server's filters need.
//
//nolint:staticcheck // they accept nothing else
func (r *response) CloseNotify() <-chan bool {
	if n, ok := r.ResponseWriter.(http.CloseNotifier); ok {
		return n.CloseNotify()
	}
	return make(chan bool)
}

// Unwrap is for http.ResponseController.
func (r *response) Unwrap() http.ResponseWriter { return r.ResponseWriter }
