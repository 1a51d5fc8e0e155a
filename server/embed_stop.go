package server

import (
	"time"
	_ "unsafe" // for go:linkname

	_ "golang.org/x/net/http2" // has the variable
)

// Times of the stop. The port is closed from its beginning on, so that each of them is one in which a lone server does not answer.
const (
	// Watches of clients end within watchGrace: within all of that if there are more than 20, and each node has more. Clients come
	// back after a random pause of their own.
	watchGrace = 100 * time.Millisecond
	// A connection of HTTP/2 is kept for goAwayGrace after its last request, for the client to read that it ends.
	goAwayGrace = 100 * time.Millisecond
	// After connectionGrace, open connections are closed and requests that are still waiting are cancelled: without a majority of
	// the datastore they would wait for seven seconds. Upstream's minute is for load balancers in front of the server.
	connectionGrace = 3 * time.Second
)

// goAwayTimeout is a variable of the server of HTTP/2: a second, which every stop of an API server would take. What it protects from,
// a reset that overtakes the announcement, needs a client that sends and does not read at that moment; it is then told nothing, as
// by a server that crashes. It cannot be set through an exported function; TestGoAwayMatchesUpstream of scripts/house fails when it
// changes.
//
//go:linkname goAwayTimeout golang.org/x/net/http2.goAwayTimeout
var goAwayTimeout time.Duration
