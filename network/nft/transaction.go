package nft

import (
	"errors"
	"fmt"
	"io"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// elementsPerMessage keeps a message's list of elements below the 64 KiB
	// that a netlink attribute can hold, with the longest chain names in it.
	elementsPerMessage = 200
	// socketBuffer is room for a large transaction on its way to the kernel, which
	// takes the memory only while it needs it.
	socketBuffer = 64 << 20
)

// transaction collects changes of one table that the kernel makes all at once or
// not at all. Errors of encoding are kept and reported by commit.
//
// The library encodes it but does not send it. It would have the kernel
// acknowledge every message and send back every rule, which takes longer than
// the change itself; and it does not encode all that rules need: see conntrack.go.
type transaction struct {
	conn     *nftables.Conn
	table    *nftables.Table
	sets     uint32 // numbers the sets of the transaction
	messages []netlink.Message
	errs     []error
}

func begin(table string) (*transaction, error) {
	t := &transaction{table: &nftables.Table{Name: table, Family: nftables.TableFamilyINet}}
	var err error
	t.conn, err = nftables.New(nftables.WithTestDial(func(m []netlink.Message) ([]netlink.Message, error) {
		t.messages = append(t.messages, m...)
		return nil, io.EOF // no answer
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return t, nil
}

// renew makes the transaction start from an empty table.
func (t *transaction) renew() {
	t.remove()
	t.conn.AddTable(t.table)
}

// remove removes the table, whether it exists or not.
func (t *transaction) remove() {
	t.conn.AddTable(t.table) // so that removing it cannot fail
	t.conn.DelTable(t.table)
}

func (t *transaction) addSet(s nftables.Set, elements []nftables.SetElement) {
	t.sets++
	// Unique within the transaction is enough; left at zero, the library counts
	// in a variable that it does not guard.
	s.Table, s.ID = t.table, t.sets
	if err := t.conn.AddSet(&s, nil); err != nil {
		t.errs = append(t.errs, fmt.Errorf("add set %s: %w", s.Name, err))
		return
	}
	t.addElements(s, elements)
}

func (t *transaction) addElements(s nftables.Set, elements []nftables.SetElement) {
	t.change("fill", s, elements, t.conn.SetAddElements)
}

func (t *transaction) delElements(s nftables.Set, elements []nftables.SetElement) {
	t.change("empty", s, elements, t.conn.SetDeleteElements)
}

func (t *transaction) change(what string, s nftables.Set, elements []nftables.SetElement, do func(*nftables.Set, []nftables.SetElement) error) {
	s.Table = t.table
	for len(elements) > 0 {
		n := min(len(elements), elementsPerMessage)
		if err := do(&s, elements[:n]); err != nil {
			t.errs = append(t.errs, fmt.Errorf("%s set %s: %w", what, s.Name, err))
		}
		elements = elements[n:]
	}
}

// refill makes a set of the table hold just its elements.
func (t *transaction) refill(s set) {
	ref := s.of(t.table)
	t.conn.FlushSet(ref)
	t.addElements(*ref, s.elements)
}

func (t *transaction) delSet(name string) {
	t.conn.DelSet(&nftables.Set{Table: t.table, Name: name})
}

// addChain adds a chain without its rules: they may jump to chains that come later.
func (t *transaction) addChain(c chain) {
	t.conn.AddChain(&nftables.Chain{Name: c.name, Table: t.table, Type: c.kind, Hooknum: c.hook, Priority: c.priority})
}

// setChains gives chains, which may exist, just the rules that they should have.
func (t *transaction) setChains(chains []chain) {
	for _, c := range chains { // all of them first: rules may jump to any
		t.addChain(c)
		t.flushChain(c.name)
	}
	for _, c := range chains {
		t.addRules(c.name, c.rules)
	}
}

func (t *transaction) addRules(chainName string, rules []commented) {
	ref := &nftables.Chain{Name: chainName, Table: t.table}
	for _, r := range rules {
		t.conn.AddRule(&nftables.Rule{
			Table: t.table, Chain: ref, Exprs: r.rule,
			UserData: userdata.AppendString(nil, userdata.TypeComment, comment(r.comment)),
		})
	}
}

// maxComment is what the kernel keeps with a rule, less its frame.
const maxComment = 250

// comment cuts a comment to what the kernel keeps.
func comment(s string) string {
	if len(s) > maxComment {
		return s[:maxComment-3] + "..."
	}
	return s
}

func (t *transaction) flushChain(name string) {
	t.conn.FlushChain(&nftables.Chain{Name: name, Table: t.table})
}

func (t *transaction) delChain(name string) {
	t.conn.DelChain(&nftables.Chain{Name: name, Table: t.table})
}

// encode returns the messages of the transaction; none if it changes nothing.
func (t *transaction) encode() ([]netlink.Message, error) {
	if err := errors.Join(append(t.errs, t.conn.Flush())...); err != nil {
		return nil, fmt.Errorf("encode change of nftables table %s: %w", t.table.Name, err)
	}
	for i := range t.messages {
		h := &t.messages[i].Header
		h.Sequence, h.PID = 0, 0 // given anew when sent
		h.Flags &^= netlink.Acknowledge | netlink.Echo
		if h.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE {
			finishConntrack(t.messages[i].Data)
		}
	}
	if n := len(t.messages); n > 0 {
		// Errors come in order, and an acknowledgement of the last change (the message
		// after it ends the transaction) only if there is none.
		t.messages[n-2].Header.Flags |= netlink.Acknowledge
	}
	return t.messages, nil
}

// commit sends the transaction through a socket of its own; see socket.
func (t *transaction) commit() error {
	var s socket
	return errors.Join(s.commit(t), s.close())
}

// socket is a way to the kernel that stays open from one transaction to the next.
// When such a socket is closed the kernel first clears away what transactions have
// removed, which takes it 10 ms, and whoever closes it waits.
type socket struct{ conn *netlink.Conn }

// commit sends a transaction and waits for the kernel's answer.
func (s *socket) commit(t *transaction) error {
	messages, err := t.encode()
	if err != nil || len(messages) == 0 {
		return err
	}
	if s.conn == nil {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		if err := conn.SetWriteBuffer(socketBuffer); err != nil {
			return errors.Join(fmt.Errorf("open nftables: %w", err), conn.Close())
		}
		s.conn = conn
	}
	if _, err = s.conn.SendMessages(messages); err == nil {
		_, err = s.conn.Receive()
	}
	if err != nil {
		// Further answers to a transaction that failed must not be taken for those to
		// the next one.
		return errors.Join(fmt.Errorf("change nftables table %s: %w", t.table.Name, err), s.close())
	}
	return nil
}

func (s *socket) close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}
