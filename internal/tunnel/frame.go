package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
)

// Kind is the kind of a stream's destination.
type Kind byte

// The kinds of destination.
const (
	Kubelet Kind = 1 // the node's own kubelet, whatever its address
	Egress  Kind = 2 // TCP to an address of the cluster's networks
	Node    Kind = 3 // the node's own kedge; nodes of before do not know it, and end the session
)

// Destination is the destination of a stream.
type Destination struct {
	Kind Kind
	Addr netip.AddrPort // of Egress; the zero value otherwise
}

// String names the destination in messages.
func (d Destination) String() string {
	switch d.Kind {
	case Kubelet:
		return "the kubelet"
	case Node:
		return "kedge"
	}
	return d.Addr.String()
}

// Reasons why a stream was not opened. A [*Refusal] wraps one of the last three.
var (
	ErrFrame       = errors.New("the other end of the tunnel violates the protocol")
	ErrForbidden   = errors.New("the node does not connect to that")
	ErrUnreachable = errors.New("the node could not connect")
	ErrBusy        = errors.New("the node has too many connections open for the server")
)

// Refusal is a node's refusal to connect, with its reason.
type Refusal struct {
	kind error // ErrForbidden, ErrUnreachable or ErrBusy
	text string
}

// Error implements error.
func (r *Refusal) Error() string {
	if r.text == "" {
		return r.kind.Error()
	}
	return r.kind.Error() + ": " + r.text
}

// Unwrap implements errors.Is.
func (r *Refusal) Unwrap() error { return r.kind }

// A request has a version, a kind, the length of the address and the address as text. An answer
// has a code, the length of a text and the text.
const (
	frameVersion = 1
	maxAddress   = len("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535")
	maxText      = 255

	codeDone        = 0
	codeForbidden   = 1
	codeUnreachable = 2
	codeBusy        = 3
)

func writeRequest(w io.Writer, d Destination) error {
	frame := []byte{frameVersion, byte(d.Kind), 0}
	if d.Kind == Egress {
		text := d.Addr.String()
		frame[2] = byte(len(text))
		frame = append(frame, text...)
	}
	_, err := w.Write(frame)
	return err
}

// readRequest reads exactly one request, and no byte more.
func readRequest(r io.Reader) (Destination, error) {
	var head [3]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Destination{}, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	length := int(head[2])
	if head[0] != frameVersion || length > maxAddress {
		return Destination{}, ErrFrame
	}
	text := make([]byte, length)
	if _, err := io.ReadFull(r, text); err != nil {
		return Destination{}, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	switch kind := Kind(head[1]); {
	case kind == Kubelet && length == 0:
		return Destination{Kind: Kubelet}, nil
	case kind == Node && length == 0:
		return Destination{Kind: Node}, nil
	case kind == Egress:
		a, err := netip.ParseAddrPort(string(text))
		// Only the canonical form, so that the address that is checked is the address that
		// is connected to.
		if err != nil || a.String() != string(text) || a.Port() == 0 || a.Addr().Zone() != "" || a.Addr().Is4In6() {
			return Destination{}, ErrFrame
		}
		return Destination{Kind: Egress, Addr: a}, nil
	}
	return Destination{}, ErrFrame
}

// writeAnswer sends the result of connecting: err is nil, or the reason of the refusal.
func writeAnswer(w io.Writer, err error) error {
	if err == nil {
		_, err := w.Write([]byte{codeDone, 0})
		return err
	}
	code := byte(codeUnreachable)
	switch {
	case errors.Is(err, ErrForbidden):
		code = codeForbidden
	case errors.Is(err, ErrBusy):
		code = codeBusy
	}
	text := err.Error()
	text = text[:min(len(text), maxText)]
	_, err = w.Write(append([]byte{code, byte(len(text))}, text...))
	return err
}

// readAnswer returns nil when there is a connection, and a [*Refusal] otherwise. Unprintable
// characters are removed from the node's text, because it goes into messages and logs.
func readAnswer(r io.Reader) error {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrFrame, err)
	}
	text := make([]byte, head[1])
	if _, err := io.ReadFull(r, text); err != nil {
		return fmt.Errorf("%w: %w", ErrFrame, err)
	}
	var kind error
	switch head[0] {
	case codeDone:
		if len(text) != 0 {
			return ErrFrame
		}
		return nil
	case codeForbidden:
		kind = ErrForbidden
	case codeUnreachable:
		kind = ErrUnreachable
	case codeBusy:
		kind = ErrBusy
	default:
		return ErrFrame
	}
	printable := strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return -1
		}
		return c
	}, string(text))
	return &Refusal{kind: kind, text: strings.TrimPrefix(printable, kind.Error()+": ")}
}
