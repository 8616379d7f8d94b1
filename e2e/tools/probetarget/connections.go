package main

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

// listener is the port of one probe.
type listener struct {
	net.Listener
	number int
	book   *book
}

func (l *listener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.book.opened(l.number)
	return &conn{Conn: accepted, number: l.number, at: time.Now(), book: l.book}, nil
}

// conn knows whose probe it is and when it came: a probe's arrival is that of its connection, so that the time this program
// takes to answer is not in it.
type conn struct {
	net.Conn
	number int
	at     time.Time
	book   *book
	ended  sync.Once
}

func (c *conn) Read(buffer []byte) (int, error) {
	n, err := c.Conn.Read(buffer)
	if errors.Is(err, syscall.ECONNRESET) {
		c.book.reset(c.number)
	}
	return n, err
}

func (c *conn) Close() error {
	c.ended.Do(func() { c.book.closed(c.number) })
	return c.Conn.Close()
}

// RemoteAddr is the way from a gRPC call to its connection.
func (c *conn) RemoteAddr() net.Addr { return peerAddress{c.Conn.RemoteAddr(), c} }

type peerAddress struct {
	net.Addr
	conn *conn
}
