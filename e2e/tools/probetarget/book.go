package main

import (
	"slices"
	"sync"
	"time"
)

type kind int

const (
	kindHTTP kind = iota
	kindTCP
	kindGRPC
	kinds
)

var kindNames = [kinds]string{"http", "tcp", "grpc"}

func kindOf(number int) kind { return kind(number % int(kinds)) }

// earlyBy is how much sooner than the period an interval must be to be called early: timers are not finer.
const earlyBy = 5 * time.Millisecond

// book holds what was seen since begin.
type book struct {
	mu     sync.Mutex
	period time.Duration
	since  time.Time
	probes []seen
	kinds  [kinds]counts
}

// seen is one probe.
type seen struct {
	last     time.Time // of its arrivals, also from before begin
	arrivals int       // since begin
}

// counts are those of one kind.
type counts struct {
	intervals               []int32 // microseconds between arrivals of the same probe
	open, openMax           int
	opened, resets, strayed int
}

// Figures are the answer to /figures. Late is what an interval is beyond the period, 0 when it is not.
type Figures struct {
	Seconds float64           `json:"seconds"`
	Kinds   map[string]Figure `json:"kinds"`
}

// Figure is about one kind, or about all.
type Figure struct {
	Probes          int     `json:"probes"`
	Silent          int     `json:"silent"` // probes without an arrival
	Arrivals        int     `json:"arrivals"`
	PerSecond       float64 `json:"per_second"`
	LateP50         float64 `json:"late_p50_ms"`
	LateP99         float64 `json:"late_p99_ms"`
	LateMax         float64 `json:"late_max_ms"`
	LateByPeriod    int     `json:"late_by_a_period"` // intervals of two periods and more
	Early           int     `json:"early"`            // by more than earlyBy
	EarlyMax        float64 `json:"early_max_ms"`
	Connections     int     `json:"connections"` // accepted since begin
	ConnectionsOpen int     `json:"connections_open"`
	ConnectionsMax  int     `json:"connections_open_max"`
	Resets          int     `json:"resets"`  // connections whose end was a reset to the reader
	Strayed         int     `json:"strayed"` // requests on another probe's port
}

func newBook(probes int, period time.Duration) *book {
	return &book{period: period, since: time.Now(), probes: make([]seen, probes)}
}

func (b *book) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.since = time.Now()
	for number := range b.probes {
		b.probes[number].arrivals = 0
	}
	for k := range b.kinds {
		open := b.kinds[k].open
		b.kinds[k] = counts{intervals: b.kinds[k].intervals[:0], open: open, openMax: open}
	}
}

func (b *book) arrived(c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	probe := &b.probes[c.number]
	if !probe.last.IsZero() {
		count := &b.kinds[kindOf(c.number)]
		count.intervals = append(count.intervals, int32(min(c.at.Sub(probe.last), time.Hour/2).Microseconds()))
	}
	probe.last = c.at
	probe.arrivals++
}

func (b *book) opened(number int) {
	b.change(number, func(c *counts) { c.open++; c.opened++; c.openMax = max(c.openMax, c.open) })
}
func (b *book) closed(number int)  { b.change(number, func(c *counts) { c.open-- }) }
func (b *book) reset(number int)   { b.change(number, func(c *counts) { c.resets++ }) }
func (b *book) strayed(number int) { b.change(number, func(c *counts) { c.strayed++ }) }

func (b *book) change(number int, how func(*counts)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	how(&b.kinds[kindOf(number)])
}

// figures copies under the lock and sorts without it: probes go on arriving.
func (b *book) figures() Figures {
	b.mu.Lock()
	seconds := time.Since(b.since).Seconds()
	copied, probes := b.kinds, slices.Clone(b.probes)
	for k := range copied {
		copied[k].intervals = slices.Clone(copied[k].intervals)
	}
	b.mu.Unlock()

	result := Figures{Seconds: seconds, Kinds: map[string]Figure{}}
	var all counts
	for k, count := range copied {
		result.Kinds[kindNames[k]] = figureOf(count, b.period, seconds, ofKind(probes, kind(k)))
		all.intervals = append(all.intervals, count.intervals...)
		all.open, all.openMax = all.open+count.open, all.openMax+count.openMax
		all.opened, all.resets, all.strayed = all.opened+count.opened, all.resets+count.resets, all.strayed+count.strayed
	}
	result.Kinds["all"] = figureOf(all, b.period, seconds, probes)
	return result
}

func ofKind(probes []seen, wanted kind) []seen {
	var found []seen
	for number := int(wanted); number < len(probes); number += int(kinds) {
		found = append(found, probes[number])
	}
	return found
}

func figureOf(count counts, period time.Duration, seconds float64, probes []seen) Figure {
	result := Figure{Probes: len(probes), Connections: count.opened, ConnectionsOpen: count.open, ConnectionsMax: count.openMax,
		Resets: count.resets, Strayed: count.strayed}
	for _, probe := range probes {
		result.Arrivals += probe.arrivals
		if probe.arrivals == 0 {
			result.Silent++
		}
	}
	result.PerSecond = float64(result.Arrivals) / seconds
	slices.Sort(count.intervals)
	beyond := func(share float64) float64 {
		if len(count.intervals) == 0 {
			return 0
		}
		interval := count.intervals[int(share*float64(len(count.intervals)-1)+0.5)]
		return float64(int64(interval)-period.Microseconds()) / 1000
	}
	result.LateP50, result.LateP99, result.LateMax = max(0, beyond(0.5)), max(0, beyond(0.99)), max(0, beyond(1))
	result.EarlyMax = max(0, -beyond(0))
	for _, interval := range count.intervals {
		took := time.Duration(interval) * time.Microsecond
		if took < period-earlyBy {
			result.Early++
		}
		if took >= 2*period {
			result.LateByPeriod++
		}
	}
	return result
}
