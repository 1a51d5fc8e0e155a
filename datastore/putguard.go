package datastore

import (
	"bytes"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// putGuard is asked before clients write values below a prefix.
type putGuard struct {
	prefix []byte
	begin  func(values [][]byte) (end func(), err error)
}

// GuardPuts makes the store ask begin before a client of this server writes values below the prefix: an error refuses the
// write, and the client can try again; otherwise end is called when the write has been answered. Of the values only what begin
// reads during the call is its. It costs a comparison of a key for each write. Call GuardPuts at most once, before Run.
func (s *Store) GuardPuts(prefix string, begin func(values [][]byte) (end func(), err error)) {
	s.guard = &putGuard{prefix: []byte(prefix), begin: begin}
}

// enter returns what to call when the write has been answered.
func (g *putGuard) enter(values [][]byte) (end func(), err error) {
	if len(values) == 0 {
		return func() {}, nil
	}
	if end, err = g.begin(values); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return end, nil
}

// put is enter for one value.
func (g *putGuard) put(in *pb.PutRequest) (end func(), err error) {
	if g == nil || !bytes.HasPrefix(in.Key, g.prefix) {
		return func() {}, nil
	}
	return g.enter([][]byte{in.Value})
}

// txn is enter for the values of a transaction.
func (g *putGuard) txn(in *pb.TxnRequest) (end func(), err error) {
	if g == nil {
		return func() {}, nil
	}
	return g.enter(g.collect(in, nil))
}

// collect appends the values that a transaction may write below the prefix.
func (g *putGuard) collect(in *pb.TxnRequest, values [][]byte) [][]byte {
	for _, ops := range [][]*pb.RequestOp{in.GetSuccess(), in.GetFailure()} {
		for _, op := range ops {
			if put := op.GetRequestPut(); put != nil && bytes.HasPrefix(put.Key, g.prefix) {
				values = append(values, put.Value)
			}
			if inner := op.GetRequestTxn(); inner != nil {
				values = g.collect(inner, values)
			}
		}
	}
	return values
}
