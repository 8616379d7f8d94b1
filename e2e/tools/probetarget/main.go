// probetarget is what the probes of a load test meet: it serves HTTP, TCP and gRPC health, notes when each probe arrives, and
// says how late they came. Probe n has port base+n of its own, as containers in life have an address of their own, and is
// HTTP, TCP or gRPC by n modulo 3. HTTP asks for /probe/n, gRPC for the service probe-n.
//
//	probetarget -probes 1700 -base-port 20000 -host 127.0.0.1 -grpc-host 10.0.0.2 -period 1s -admin 127.0.0.1:19999
//
// POST /begin on the admin address starts the counting, GET /figures gives one JSON object. Times are milliseconds.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
)

const (
	servicePrefix = "probe-"
	pathPrefix    = "/probe/"
)

// settings are the flags.
type settings struct {
	probes, basePort      int
	host, grpcHost, admin string
	period                time.Duration
}

func main() {
	var wanted settings
	flag.IntVar(&wanted.probes, "probes", 0, "how many there are")
	flag.IntVar(&wanted.basePort, "base-port", 20000, "port of probe 0")
	flag.StringVar(&wanted.host, "host", "127.0.0.1", "address that HTTP and TCP listen on")
	flag.StringVar(&wanted.grpcHost, "grpc-host", "127.0.0.1", "address that gRPC listens on")
	flag.StringVar(&wanted.admin, "admin", "127.0.0.1:19999", "address and port of /begin and /figures")
	flag.DurationVar(&wanted.period, "period", time.Second, "the probes' period")
	flag.Parse()
	if err := run(wanted); err != nil {
		fmt.Fprintln(os.Stderr, "probetarget:", err)
		os.Exit(1)
	}
}

// run serves until something fails.
func run(wanted settings) error {
	if wanted.probes <= 0 || wanted.period <= 0 {
		return errors.New("-probes and -period must be positive")
	}
	book := newBook(wanted.probes, wanted.period)
	failures := make(chan error)
	serve := func(what string, do func() error) {
		go func() { failures <- fmt.Errorf("%s: %w", what, do()) }()
	}
	web := &http.Server{
		Handler:     webHandler(book),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ErrorLog:    log.New(io.Discard, "", 0), // a peer that goes away is counted, not told
	}
	checks := grpc.NewServer()
	health.RegisterHealthServer(checks, &healthServer{book: book})
	for number := range wanted.probes {
		host := wanted.host
		if kindOf(number) == kindGRPC {
			host = wanted.grpcHost
		}
		address := net.JoinHostPort(host, strconv.Itoa(wanted.basePort+number))
		plain, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		l := &listener{Listener: plain, number: number, book: book}
		serve(address, func() error {
			switch kindOf(number) {
			case kindHTTP:
				return web.Serve(l)
			case kindGRPC:
				return checks.Serve(l)
			default:
				return serveTCP(l, book)
			}
		})
	}
	serve("admin", func() error { return http.ListenAndServe(wanted.admin, adminHandler(book)) })
	return <-failures
}

// connKey is where a request's context holds its connection.
type connKey struct{}

func webHandler(book *book) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := r.Context().Value(connKey{}).(*conn)
		if strings.TrimPrefix(r.URL.Path, pathPrefix) != strconv.Itoa(c.number) {
			book.strayed(c.number)
			http.NotFound(w, r)
			return
		}
		book.arrived(c)
		io.WriteString(w, "ok")
	})
}

type healthServer struct {
	health.UnimplementedHealthServer
	book *book
}

func (s *healthServer) Check(ctx context.Context, request *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	from, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("a call without a peer")
	}
	c := from.Addr.(peerAddress).conn
	if strings.TrimPrefix(request.Service, servicePrefix) != strconv.Itoa(c.number) {
		s.book.strayed(c.number)
		return &health.HealthCheckResponse{Status: health.HealthCheckResponse_SERVICE_UNKNOWN}, nil
	}
	s.book.arrived(c)
	return &health.HealthCheckResponse{Status: health.HealthCheckResponse_SERVING}, nil
}

// serveTCP does what a server does with a client that says nothing: it waits for the client to go, then goes too.
func serveTCP(l net.Listener, book *book) error {
	for {
		accepted, err := l.Accept()
		if err != nil {
			return err
		}
		book.arrived(accepted.(*conn))
		go func() {
			io.Copy(io.Discard, accepted)
			accepted.Close()
		}()
	}
}

func adminHandler(book *book) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /begin", func(http.ResponseWriter, *http.Request) { book.begin() })
	mux.HandleFunc("GET /figures", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(book.figures())
	})
	return mux
}
